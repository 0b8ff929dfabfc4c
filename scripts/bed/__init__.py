"""The rooms of scripts/openstack, which has the commands. From the bottom up, and each knows only those before it:

storage        scripts/services as a module, on whose storage all this runs
place          where everything is, and which daemons there are
processes      which of them run, how they are started and stopped
state          what is remembered from one start to the next
configuration  what each daemon is told
api            OpenStack's API, as far as a start needs it
daemons        how each daemon is started, and when it is ready
order          in which order all of it starts and stops, and whether a start is still good
"""
