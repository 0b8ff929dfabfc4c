"""What Cinder uses of volfs. Only this package imports Cinder, and os-brick as its users do."""
