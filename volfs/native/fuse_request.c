/* Requests that volfs answers without pyfuse3: because it lacks the operation, or because a task for each costs too much.
 *
 * Python decides in both cases. A request that needs a task comes to it as an object with a method for each kind of
 * answer. Reads and writes are offered first to functions that must decide at once: a write is taken from where the kernel
 * has put it, without another copy, and a read whose bytes come by a library's own thread (sink.h) is answered from there,
 * without the GIL. The answer to a read may also be there at once.
 */
#include "fuse_request.h"
#include "sink.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

PyObject *operations;

typedef struct {
    PyObject_HEAD
    fuse_req_t req; /* NULL once it is answered */
} Request;

static PyObject *request_new(fuse_req_t req)
{
    Request *self = PyObject_New(Request, &request_type);

    if (self)
        self->req = req;
    return (PyObject *)self;
}

static void request_dealloc(Request *self)
{
    if (self->req) /* a task that ended without an answer; whoever asked must not wait for ever */
        fuse_reply_err(self->req, EIO);
    PyObject_Free(self);
}

/* The request, to be answered now. NULL with an exception when that was done before. */
static fuse_req_t take(PyObject *object)
{
    Request *self = (Request *)object;
    fuse_req_t req = self->req;

    self->req = NULL;
    if (req == NULL)
        PyErr_SetString(PyExc_RuntimeError, "this request is answered already");
    return req;
}

static PyObject *request_error(PyObject *self, PyObject *args)
{
    int number;
    fuse_req_t req;

    if (!PyArg_ParseTuple(args, "i", &number) || (req = take(self)) == NULL)
        return NULL;
    fuse_reply_err(req, number); /* fails where nobody waits any more: an unmount, an interrupted program */
    Py_RETURN_NONE;
}

static PyObject *request_data(PyObject *self, PyObject *args)
{
    Py_buffer data;
    fuse_req_t req;

    if (!PyArg_ParseTuple(args, "y*", &data))
        return NULL;
    if ((req = take(self)) != NULL)
        fuse_reply_buf(req, data.buf, data.len);
    PyBuffer_Release(&data);
    if (req == NULL)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *request_count(PyObject *self, PyObject *args)
{
    Py_ssize_t count;
    fuse_req_t req;

    if (!PyArg_ParseTuple(args, "n", &count) || (req = take(self)) == NULL)
        return NULL;
    fuse_reply_write(req, count);
    Py_RETURN_NONE;
}

static PyObject *request_offset(PyObject *self, PyObject *args)
{
    long long offset;
    fuse_req_t req;

    if (!PyArg_ParseTuple(args, "L", &offset) || (req = take(self)) == NULL)
        return NULL;
    fuse_reply_lseek(req, offset);
    Py_RETURN_NONE;
}

static PyObject *request_interrupted(PyObject *self, PyObject *unused)
{
    Request *request = (Request *)self;

    return PyBool_FromLong(request->req == NULL || fuse_req_interrupted(request->req));
}

static PyMethodDef request_methods[] = {
    {"error", request_error, METH_VARARGS, "error(errno): answer with an error, or 0 for success."},
    {"data", request_data, METH_VARARGS, "data(bytes): answer a read."},
    {"count", request_count, METH_VARARGS, "count(bytes): answer a write or a copy."},
    {"offset", request_offset, METH_VARARGS, "offset(position): answer an lseek."},
    {"interrupted", request_interrupted, METH_NOARGS, "Whether a signal came to who asked, and waits for the answer."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject request_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "volfs.native.fuse_session.Request",
    .tp_basicsize = sizeof(Request),
    .tp_dealloc = (destructor)request_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A request of the kernel that waits for its one answer; EIO if it is dropped without.",
    .tp_methods = request_methods,
};

void request_start(fuse_req_t req, const char *name, const char *format, ...)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *request = request_new(req), *arguments, *result = NULL;
    va_list values;

    if (request == NULL)
        fuse_reply_err(req, ENOMEM);
    else {
        va_start(values, format);
        arguments = Py_VaBuildValue(format, values);
        va_end(values);
        if (arguments)
            result = PyObject_CallMethod(operations, "start", "sOO", name, request, arguments);
        if (result == NULL)
            PyErr_WriteUnraisable(operations); /* and the request is answered by its dealloc */
        Py_XDECREF(result);
        Py_XDECREF(arguments);
        Py_DECREF(request);
    }
    PyGILState_Release(gil);
}

/* A read that somebody else's thread answers. */
struct reader {
    struct sink sink;
    fuse_req_t req;
    uint64_t handle;
    size_t size;
    off_t offset;
};

static int read_done(struct sink *sink, char *data, ssize_t status)
{
    struct reader *reader = (struct reader *)((char *)sink - offsetof(struct reader, sink));

    if (status >= 0)
        fuse_reply_buf(reader->req, data, status);
    else /* what it means, and whether to try again, is for Python to say */
        request_start(reader->req, "read_failed", "(KLni)", (unsigned long long)reader->handle,
                      (long long)reader->offset, (Py_ssize_t)reader->size, (int)-status);
    free(reader);
    return 0;
}

/* Call a method that takes an unsigned handle, an offset and one more. Its result, or NULL after telling of an exception. */
static PyObject *ask(PyObject *method, uint64_t handle, off_t offset, PyObject *size, PyObject *more)
{
    PyObject *args[] = {operations, PyLong_FromUnsignedLongLong(handle), PyLong_FromLongLong(offset), size, more};
    PyObject *result = NULL;

    if (args[1] && args[2])
        result = PyObject_VectorcallMethod(method, args, (more ? 5 : 4) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    if (result == NULL)
        PyErr_WriteUnraisable(operations);
    Py_XDECREF(args[1]);
    Py_XDECREF(args[2]);
    return result;
}

int request_read(fuse_req_t req, uint64_t handle, size_t size, off_t offset)
{
    static PyObject *name;
    PyGILState_STATE gil;
    PyObject *capsule = NULL, *length = NULL, *result = NULL;
    struct reader *reader = malloc(sizeof *reader);
    int taken = 0;

    if (reader == NULL)
        return 0;
    *reader = (struct reader){{read_done}, req, handle, size, offset};
    gil = PyGILState_Ensure();
    if (name == NULL)
        name = PyUnicode_InternFromString("start_read");
    capsule = PyCapsule_New(&reader->sink, SINK, NULL);
    length = PyLong_FromSize_t(size);
    if (name && capsule && length)
        result = ask(name, handle, offset, length, capsule);
    taken = result == Py_True; /* then it is another's, who may have answered and freed it by now */
    if (result && PyBytes_Check(result)) {
        Py_BEGIN_ALLOW_THREADS
        read_done(&reader->sink, PyBytes_AS_STRING(result), PyBytes_GET_SIZE(result));
        Py_END_ALLOW_THREADS
        taken = 1;
    } else if (!taken)
        free(reader);
    Py_XDECREF(result);
    Py_XDECREF(length);
    Py_XDECREF(capsule);
    PyGILState_Release(gil);
    return taken;
}

int request_write(fuse_req_t req, uint64_t handle, const void *data, size_t size, off_t offset)
{
    static PyObject *name;
    PyGILState_STATE gil = PyGILState_Ensure();
    /* Read-only, and good until the call returns: who keeps it, keeps a copy. */
    PyObject *view = PyMemoryView_FromMemory((char *)data, size, PyBUF_READ), *result = NULL;
    int taken;

    if (name == NULL)
        name = PyUnicode_InternFromString("start_write");
    if (name && view)
        result = ask(name, handle, offset, view, NULL);
    taken = result == Py_True;
    Py_XDECREF(result);
    Py_XDECREF(view);
    PyGILState_Release(gil);
    if (taken)
        fuse_reply_write(req, size);
    return taken;
}
