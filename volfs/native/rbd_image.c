/* Reads and writes of an open RBD image that Python starts and does not wait for.
 *
 * Why it exists: python-rbd takes bytes objects only, and calls back into Python, for each request, on a thread of librbd:
 * a copy, which took a fifth of the main thread's time for a MiB written, and two switches of the GIL. Here a write is taken from any buffer, a read is handed to a sink (sink.h) by librbd's thread, and Python is
 * woken only when it said that it waits.
 *
 * How it comes to the image: python-rbd opens and owns it, and hides the handle. Loaded with RTLD_GLOBAL before python-rbd,
 * this library's rbd_get_stripe_unit is the one that python-rbd binds to; it notes the handle that it is called with and
 * calls librbd's own. Reading the handle from the object's memory would depend on how each release of Ceph lays it out.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "sink.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <rbd/librbd.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

static _Thread_local rbd_image_t noted;

__attribute__((visibility("default"))) int rbd_get_stripe_unit(rbd_image_t image, uint64_t *unit)
{
    int (*librbd)(rbd_image_t, uint64_t *) = (int (*)(rbd_image_t, uint64_t *))dlsym(RTLD_NEXT, "rbd_get_stripe_unit");

    noted = image;
    return librbd ? librbd(image, unit) : -ENOSYS;
}

/* A request under way. */
struct op {
    struct op *previous, *next;
    struct state *state;
    uint64_t number; /* of a write: how many were begun before it. The ring is in this order. */
    uint64_t offset;
    size_t length;
    struct timespec since;
    struct sink *sink; /* of a read, until it is answered */
    char *data;        /* of a read, until the sink keeps it */
};

/* What the image's object and the requests under way share; gone with the last of them. */
struct state {
    atomic_int users;
    pthread_mutex_t lock; /* of all that follows. Never held over a call of Python or librbd. */
    struct op reads, writes; /* the heads of two rings */
    uint64_t begun; /* writes, so far */
    size_t read_count, write_count, write_bytes;
    int failure;                     /* errno of the first write that failed, until a flush tells it */
    int untold;                      /* of the last one that failed since a write told one */
    PyObject *wake;                  /* called when somebody waits for what has come; borrowed of the object */
    size_t wake_count, wake_bytes;   /* he waits for as few writes as this */
    int wake_wanted;
};

typedef struct {
    PyObject_HEAD
    rbd_image_t image;
    PyObject *owner; /* python-rbd's object */
    PyObject *wake;
    struct state *state;
} Image;

static void insert(struct op *ring, struct op *op)
{
    op->next = ring;
    op->previous = ring->previous;
    op->previous->next = op;
    ring->previous = op;
}

static void take_out(struct op *op)
{
    op->previous->next = op->next;
    op->next->previous = op->previous;
}

static void leave(struct state *state)
{
    if (atomic_fetch_sub(&state->users, 1) == 1) {
        pthread_mutex_destroy(&state->lock);
        free(state);
    }
}

/* Whether to call wake(), which is then off until it is asked for again. With the lock. */
static int take_wake(struct state *state)
{
    int wake = state->wake_wanted && state->write_count <= state->wake_count && state->write_bytes <= state->wake_bytes;

    if (wake)
        state->wake_wanted = 0;
    return wake;
}

static void call_wake(struct state *state)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *wake, *result;

    pthread_mutex_lock(&state->lock);
    wake = Py_XNewRef(state->wake); /* it goes with the GIL held, so it is still there */
    pthread_mutex_unlock(&state->lock);
    if (wake) {
        result = PyObject_CallNoArgs(wake);
        if (result == NULL)
            PyErr_WriteUnraisable(wake);
        Py_XDECREF(result);
        Py_DECREF(wake);
    }
    PyGILState_Release(gil);
}

/* The end of a request that was taken out of its ring. */
static void finish(struct op *op, int wake)
{
    struct state *state = op->state;

    if (wake)
        call_wake(state);
    free(op->data);
    free(op);
    leave(state);
}

static void written(rbd_completion_t completion, void *arg)
{
    struct op *op = arg;
    struct state *state = op->state;
    int status = rbd_aio_get_return_value(completion), wake;

    rbd_aio_release(completion);
    pthread_mutex_lock(&state->lock);
    if (status < 0) {
        if (!state->failure)
            state->failure = -status;
        state->untold = -status;
    }
    take_out(op);
    state->write_count--;
    state->write_bytes -= op->length;
    wake = take_wake(state);
    pthread_mutex_unlock(&state->lock);
    finish(op, wake);
}

static void have_read(rbd_completion_t completion, void *arg)
{
    struct op *op = arg;
    struct state *state = op->state;
    struct sink *sink;
    ssize_t status = rbd_aio_get_return_value(completion);
    int wake;

    rbd_aio_release(completion);
    pthread_mutex_lock(&state->lock);
    sink = op->sink;
    take_out(op);
    pthread_mutex_unlock(&state->lock);
    if (status >= 0 && (size_t)status != op->length)
        status = -EIO; /* shrunk; less than was asked for would look like the end */
    if (sink && sink->done(sink, op->data, status))
        op->data = NULL;
    pthread_mutex_lock(&state->lock);
    state->read_count--; /* only now may the session go that the sink answers to */
    wake = take_wake(state);
    pthread_mutex_unlock(&state->lock);
    finish(op, wake);
}

static struct op *new_op(Image *self, uint64_t offset, size_t length, size_t room)
{
    struct op *op = malloc(sizeof *op);
    char *data = room ? malloc(room) : NULL;

    if (op == NULL || (room && data == NULL)) {
        free(op);
        free(data);
        PyErr_NoMemory();
        return NULL;
    }
    op->data = data;
    op->state = self->state;
    op->offset = offset;
    op->length = length;
    op->sink = NULL;
    clock_gettime(CLOCK_MONOTONIC, &op->since);
    atomic_fetch_add(&self->state->users, 1);
    return op;
}

static PyObject *failed(int status)
{
    errno = -status;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *image_write(Image *self, PyObject *args)
{
    unsigned long long offset;
    Py_buffer data;
    struct state *state = self->state;
    struct op *op;
    rbd_completion_t completion;
    int status;

    if (!PyArg_ParseTuple(args, "Ky*", &offset, &data))
        return NULL;
    op = new_op(self, offset, data.len, 0);
    if (op == NULL) {
        PyBuffer_Release(&data);
        return NULL;
    }
    pthread_mutex_lock(&state->lock);
    op->number = state->begun++;
    insert(&state->writes, op);
    state->write_count++;
    state->write_bytes += op->length;
    pthread_mutex_unlock(&state->lock);
    status = rbd_aio_create_completion(op, written, &completion);
    if (status >= 0) {
        Py_BEGIN_ALLOW_THREADS /* it copies the data (rbd_disable_zero_copy_writes) */
        status = rbd_aio_write(self->image, offset, data.len, data.buf, completion);
        Py_END_ALLOW_THREADS
        if (status < 0)
            rbd_aio_release(completion);
    }
    PyBuffer_Release(&data);
    if (status < 0) {
        pthread_mutex_lock(&state->lock);
        take_out(op);
        state->write_count--;
        state->write_bytes -= op->length;
        pthread_mutex_unlock(&state->lock);
        finish(op, 0);
        return failed(status);
    }
    Py_RETURN_NONE;
}

static PyObject *image_read(Image *self, PyObject *args)
{
    unsigned long long offset;
    Py_ssize_t length;
    PyObject *capsule;
    struct state *state = self->state;
    struct sink *sink;
    struct op *op;
    rbd_completion_t completion;
    int status;

    if (!PyArg_ParseTuple(args, "KnO", &offset, &length, &capsule))
        return NULL;
    sink = PyCapsule_GetPointer(capsule, SINK);
    if (sink == NULL)
        return NULL;
    op = new_op(self, offset, length, length);
    if (op == NULL)
        return NULL;
    op->sink = sink;
    pthread_mutex_lock(&state->lock);
    insert(&state->reads, op);
    state->read_count++;
    pthread_mutex_unlock(&state->lock);
    status = rbd_aio_create_completion(op, have_read, &completion);
    if (status >= 0) {
        Py_BEGIN_ALLOW_THREADS /* it may wait for a lock of librbd, whose threads may wait for the GIL */
        status = rbd_aio_read(self->image, offset, length, op->data, completion);
        Py_END_ALLOW_THREADS
        if (status < 0)
            rbd_aio_release(completion);
    }
    if (status < 0) { /* the sink stays the caller's */
        pthread_mutex_lock(&state->lock);
        take_out(op);
        state->read_count--;
        pthread_mutex_unlock(&state->lock);
        finish(op, 0);
        return failed(status);
    }
    Py_RETURN_NONE;
}

static PyObject *image_overlaps(Image *self, PyObject *args)
{
    unsigned long long offset, length, before;
    struct op *ring = &self->state->writes;
    int found = 0;

    if (!PyArg_ParseTuple(args, "KKK", &offset, &length, &before))
        return NULL;
    pthread_mutex_lock(&self->state->lock);
    for (struct op *op = ring->next; op != ring && op->number < before && !found; op = op->next)
        found = op->offset < offset + length && offset < op->offset + op->length;
    pthread_mutex_unlock(&self->state->lock);
    return PyBool_FromLong(found);
}

static PyObject *image_wake_at(Image *self, PyObject *args)
{
    Py_ssize_t count, bytes;
    struct state *state = self->state;

    if (!PyArg_ParseTuple(args, "nn", &count, &bytes))
        return NULL;
    pthread_mutex_lock(&state->lock);
    state->wake_count = count;
    state->wake_bytes = bytes;
    state->wake_wanted = 1;
    pthread_mutex_unlock(&state->lock);
    Py_RETURN_NONE;
}

static PyObject *image_take_failure(Image *self, PyObject *unused)
{
    int failure;

    pthread_mutex_lock(&self->state->lock);
    failure = self->state->failure;
    self->state->failure = self->state->untold = 0;
    pthread_mutex_unlock(&self->state->lock);
    return PyLong_FromLong(failure);
}

static PyObject *image_take_untold(Image *self, PyObject *unused)
{
    int untold;

    pthread_mutex_lock(&self->state->lock);
    untold = self->state->untold;
    self->state->untold = 0;
    pthread_mutex_unlock(&self->state->lock);
    return PyLong_FromLong(untold);
}

static PyObject *image_expire(Image *self, PyObject *args)
{
    double seconds;
    struct timespec now;
    struct state *state = self->state;
    Py_ssize_t count = 0;
    struct sink *sink;

    if (!PyArg_ParseTuple(args, "d", &seconds))
        return NULL;
    clock_gettime(CLOCK_MONOTONIC, &now);
    do {
        sink = NULL;
        pthread_mutex_lock(&state->lock);
        for (struct op *op = state->reads.next; op != &state->reads && !sink; op = op->next) {
            double age = now.tv_sec - op->since.tv_sec + (now.tv_nsec - op->since.tv_nsec) / 1e9;
            if (op->sink && age >= seconds) {
                sink = op->sink;
                op->sink = NULL; /* the read itself may come yet, for nobody */
            }
        }
        pthread_mutex_unlock(&state->lock);
        if (sink) {
            sink->done(sink, NULL, -ETIMEDOUT);
            count++;
        }
    } while (sink);
    return PyLong_FromSsize_t(count);
}

static PyObject *get_size(Image *self, void *member)
{
    size_t value;

    pthread_mutex_lock(&self->state->lock);
    value = *(size_t *)((char *)self->state + (size_t)member);
    pthread_mutex_unlock(&self->state->lock);
    return PyLong_FromSize_t(value);
}

static PyObject *get_begun(Image *self, void *unused)
{
    uint64_t begun;

    pthread_mutex_lock(&self->state->lock);
    begun = self->state->begun;
    pthread_mutex_unlock(&self->state->lock);
    return PyLong_FromUnsignedLongLong(begun);
}

static PyObject *get_untold(Image *self, void *unused)
{
    return PyLong_FromLong(self->state->untold);
}

/* Whoever is woken holds the image as a rule: a cycle, which only the garbage collector sees. */
static int image_traverse(Image *self, visitproc visit, void *arg)
{
    Py_VISIT(self->owner);
    Py_VISIT(self->wake);
    return 0;
}

static int image_clear(Image *self)
{
    if (self->state) {
        pthread_mutex_lock(&self->state->lock);
        self->state->wake = NULL;
        pthread_mutex_unlock(&self->state->lock);
    }
    Py_CLEAR(self->owner);
    Py_CLEAR(self->wake);
    return 0;
}

static void image_dealloc(Image *self)
{
    PyObject_GC_UnTrack(self);
    image_clear(self);
    if (self->state)
        leave(self->state);
    PyObject_GC_Del(self);
}

static PyMethodDef image_methods[] = {
    {"write", (PyCFunction)image_write, METH_VARARGS, "write(offset, data): start one; the data is copied."},
    {"read", (PyCFunction)image_read, METH_VARARGS, "read(offset, length, sink): start one, for the sink."},
    {"overlaps", (PyCFunction)image_overlaps, METH_VARARGS,
     "overlaps(offset, length, before): whether a write there is under way, of the first so many that were begun."},
    {"wake_at", (PyCFunction)image_wake_at, METH_VARARGS,
     "wake_at(writes, bytes): call wake once, after a request that leaves so few writes under way."},
    {"take_failure", (PyCFunction)image_take_failure, METH_NOARGS,
     "For a flush: errno of the first write that failed since the last call. 0: none."},
    {"take_untold", (PyCFunction)image_take_untold, METH_NOARGS,
     "For a write: errno of the last one that failed since either was called. 0: none."},
    {"expire", (PyCFunction)image_expire, METH_VARARGS,
     "expire(seconds): answer reads as old as that with ETIMEDOUT; how many."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef image_members[] = {
    {"reads", (getter)get_size, NULL, "under way", (void *)offsetof(struct state, read_count)},
    {"writes", (getter)get_size, NULL, "under way", (void *)offsetof(struct state, write_count)},
    {"begun", (getter)get_begun, NULL, "How many writes were begun so far.", NULL},
    {"size", (getter)get_size, NULL, "of the writes under way, in bytes", (void *)offsetof(struct state, write_bytes)},
    {"untold", (getter)get_untold, NULL, "What take_untold would return.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject image_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "volfs.native.rbd_image.Image",
    .tp_basicsize = sizeof(Image),
    .tp_dealloc = (destructor)image_dealloc,
    .tp_traverse = (traverseproc)image_traverse,
    .tp_clear = (inquiry)image_clear,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .tp_doc = "Requests on an image that python-rbd opened, and must not close before the last is answered.",
    .tp_methods = image_methods,
    .tp_getset = image_members,
};

static PyObject *py_bind(PyObject *module, PyObject *args)
{
    PyObject *owner, *wake, *result;
    struct state *state;
    Image *self;

    if (!PyArg_ParseTuple(args, "OO", &owner, &wake))
        return NULL;
    noted = NULL;
    result = PyObject_CallMethod(owner, "stripe_unit", NULL);
    if (result == NULL)
        return NULL;
    Py_DECREF(result);
    if (noted == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "python-rbd was loaded before volfs.native.rbd_image");
        return NULL;
    }
    self = PyObject_GC_New(Image, &image_type);
    if (self == NULL)
        return NULL;
    state = calloc(1, sizeof *state);
    self->image = noted;
    self->owner = Py_NewRef(owner);
    self->wake = Py_NewRef(wake);
    self->state = state;
    if (state == NULL) {
        PyObject_GC_Track(self); /* which dealloc takes back */
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    atomic_init(&state->users, 1);
    pthread_mutex_init(&state->lock, NULL);
    state->reads.next = state->reads.previous = &state->reads;
    state->writes.next = state->writes.previous = &state->writes;
    state->wake = wake;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static PyMethodDef methods[] = {
    {"bind", py_bind, METH_VARARGS, "bind(image, wake): requests on an open rbd.Image; `wake()` is called from any thread."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "rbd_image", "Requests on an RBD image that Python does not wait for.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_rbd_image(void)
{
    if (PyType_Ready(&image_type) < 0)
        return NULL;
    return PyModule_Create(&definition);
}
