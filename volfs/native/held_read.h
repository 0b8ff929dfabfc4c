/* The type HeldRead, of held_read.c. */
#ifndef VOLFS_HELD_READ_H
#define VOLFS_HELD_READ_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyTypeObject held_read_type;

#endif
