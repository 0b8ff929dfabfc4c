/* FUSE requests that volfs answers without pyfuse3. */
#ifndef VOLFS_FUSE_REQUEST_H
#define VOLFS_FUSE_REQUEST_H

#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 314
#include <Python.h>

#include <fuse3/fuse_lowlevel.h>

extern PyTypeObject request_type;

/* Who is asked: an object with start(name, request, arguments), start_read(...) and start_write(...); NULL for nobody. */
extern PyObject *operations;

/* Ask start() for a task that answers the request. `format` builds the tuple of arguments. Without the GIL. */
void request_start(fuse_req_t req, const char *name, const char *format, ...);

/* Ask start_read() or start_write() whether the request is answered without a task; 0 when it is not. Without the GIL. */
int request_read(fuse_req_t req, uint64_t handle, size_t size, off_t offset);
int request_write(fuse_req_t req, uint64_t handle, const void *data, size_t size, off_t offset);

#endif
