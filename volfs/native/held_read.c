/* A read whose bytes wait for whoever asks for them, for reading ahead (volfs/readahead.py).
 *
 * Why it exists: as a task of Python's, the read of a MiB ahead costs the daemon 0.7 ms of processor time more than one
 * that librbd hands to the kernel by itself. Here the bytes stay where the library has put them, and are handed on from
 * there: by the library's thread when somebody waits for them already, else when he comes.
 */
#include "held_read.h"
#include "sink.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

/* What the object and the read under way share; gone with the last of them. */
struct held {
    struct sink sink;
    atomic_int users;
    pthread_mutex_t lock; /* of all that follows, until `come` is set. Never held over a call of another's. */
    int come;
    char *data;
    ssize_t status; /* bytes at `data`, or a negative errno */
    struct sink *waiter;
    size_t begin, wanted; /* by him */
};

typedef struct {
    PyObject_HEAD
    struct held *held;
} HeldRead;

static void leave(struct held *held)
{
    if (atomic_fetch_sub(&held->users, 1) == 1) {
        pthread_mutex_destroy(&held->lock);
        free(held->data);
        free(held);
    }
}

/* Hand on what has come. */
static void answer(struct held *held, struct sink *sink, size_t begin, size_t wanted)
{
    if (held->status < 0)
        sink->done(sink, NULL, held->status);
    else if (begin + wanted > (size_t)held->status)
        sink->done(sink, NULL, -EIO);
    else
        sink->done(sink, held->data + begin, wanted);
}

static int come(struct sink *sink, char *data, ssize_t status)
{
    struct held *held = (struct held *)((char *)sink - offsetof(struct held, sink));
    struct sink *waiter;

    pthread_mutex_lock(&held->lock);
    held->come = 1;
    held->data = status < 0 ? NULL : data;
    held->status = status;
    waiter = held->waiter;
    pthread_mutex_unlock(&held->lock);
    if (waiter)
        answer(held, waiter, held->begin, held->wanted);
    leave(held);
    return status >= 0;
}

static PyObject *held_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    HeldRead *self;
    struct held *held = calloc(1, sizeof *held);

    if (held == NULL)
        return PyErr_NoMemory();
    held->sink.done = come;
    atomic_init(&held->users, 1);
    pthread_mutex_init(&held->lock, NULL);
    self = (HeldRead *)type->tp_alloc(type, 0);
    if (self == NULL) {
        leave(held);
        return NULL;
    }
    self->held = held;
    return (PyObject *)self;
}

static void held_dealloc(HeldRead *self)
{
    leave(self->held);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *held_begin(HeldRead *self, PyObject *args)
{
    PyObject *start, *offset, *length, *capsule, *result;
    int begun;

    if (!PyArg_ParseTuple(args, "OOO", &start, &offset, &length))
        return NULL;
    capsule = PyCapsule_New(&self->held->sink, SINK, NULL);
    if (capsule == NULL)
        return NULL;
    atomic_fetch_add(&self->held->users, 1); /* the read's, which may be done with it before the call returns */
    result = PyObject_CallFunctionObjArgs(start, offset, length, capsule, NULL);
    begun = result == Py_True;
    Py_XDECREF(result);
    Py_DECREF(capsule);
    if (!begun)
        leave(self->held);
    return result == NULL ? NULL : PyBool_FromLong(begun);
}

static PyObject *held_give(HeldRead *self, PyObject *args)
{
    PyObject *capsule;
    struct held *held = self->held;
    struct sink *sink;
    Py_ssize_t begin, wanted;
    int come, taken;

    if (!PyArg_ParseTuple(args, "Onn", &capsule, &begin, &wanted))
        return NULL;
    sink = PyCapsule_GetPointer(capsule, SINK);
    if (sink == NULL)
        return NULL;
    pthread_mutex_lock(&held->lock);
    come = held->come;
    taken = come ? held->status >= 0 : held->waiter == NULL;
    if (taken && !come) {
        held->waiter = sink;
        held->begin = begin;
        held->wanted = wanted;
    }
    pthread_mutex_unlock(&held->lock);
    if (taken && come) {
        Py_BEGIN_ALLOW_THREADS
        answer(held, sink, begin, wanted);
        Py_END_ALLOW_THREADS
    }
    return PyBool_FromLong(taken);
}

static PyMethodDef held_methods[] = {
    {"begin", (PyCFunction)held_begin, METH_VARARGS,
     "begin(start, offset, length): have start(offset, length, sink) begin the read; whether it did. Once."},
    {"give", (PyCFunction)held_give, METH_VARARGS,
     "give(sink, begin, length): hand so many bytes to the sink, now or when they come; False: somebody else waits, or"
     " the read has failed."},
    {NULL, NULL, 0, NULL},
};

PyTypeObject held_read_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "volfs.native.fuse_session.HeldRead",
    .tp_basicsize = sizeof(HeldRead),
    .tp_new = held_new,
    .tp_dealloc = (destructor)held_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A read ahead: its bytes wait here for the request that they are for.",
    .tp_methods = held_methods,
};
