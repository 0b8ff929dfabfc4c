/* What pyfuse3 leaves out of its libfuse session: what is agreed at the handshake, operations it does not know, and
 * answers that must be quick.
 *
 * Why it exists: pyfuse3 3.5 has no lseek, fallocate and copy_file_range, and drops the flags of a write, among them
 * RWF_DSYNC. It makes a task for each read and write, and copies the bytes once more (fuse_request.c).
 *
 * Besides, it has no hook into the init handshake, the only place where a mount of any user can raise the number of
 * buffered requests under way (kernel default: 12), and where the kernel can be told not to drop a file's page cache
 * whenever its mtime has moved. It moves with every write; a page dropped while a write to it is on its way here may be
 * read again from before that write, and then stays so: processes that write the same pages would miss each other's
 * bytes, and their own. Each open drops the cache anyway, which is what volfs promises.
 *
 * And before each buffered write the kernel asks for the attribute security.capability, in case the file must lose it;
 * volumes never have one, and it takes no coroutine to say so. Turning getxattr off (ENOSYS) would take away user.volfs.*
 * as well, and the capability that stops the question (FUSE_HANDLE_KILLPRIV_V2) is not known to libfuse 3.14.
 *
 * How: loaded with RTLD_GLOBAL before pyfuse3, the definitions here of fuse_session_new and fuse_session_receive_buf are
 * those that pyfuse3 binds to. The first replaces entries of the operation table; both call libfuse's own. Where that does not come about (another libfuse,
 * static linking), pyfuse3 works as without it, and hooked() tells.
 */
#define _GNU_SOURCE
#include "fuse_request.h"
#include "held_read.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef int receive(struct fuse_session *, struct fuse_buf *);
typedef struct fuse_session *new_session(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);

/* Set before the mount and only read by its session, of which pyfuse3 allows one in a process. */
static struct fuse_lowlevel_ops pyfuse3;
static unsigned max_background;
static int agreed;

static void init(void *userdata, struct fuse_conn_info *conn)
{
    if (pyfuse3.init)
        pyfuse3.init(userdata, conn);
    if (max_background)
        conn->max_background = max_background; /* libfuse sets the congestion threshold to three quarters of it */
    conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA; /* which drops pages by mtime, see above */
    /* Or the kernel takes a volume for empty after an open with O_TRUNC: mappings of it get SIGBUS or lose what they
     * wrote, appends land inside. Without it, the open is followed by a setattr, whose answer tells the true size. */
    conn->want &= ~FUSE_CAP_ATOMIC_O_TRUNC;
    agreed = 1;
}

static void getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
    if (strcmp(name, "security.capability") == 0)
        fuse_reply_err(req, ENODATA);
    else
        pyfuse3.getxattr(req, ino, name, size);
}

static void read_(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *file)
{
    if (!request_read(req, file->fh, size, offset))
        request_start(req, "read", "(KLn)", (unsigned long long)file->fh, (long long)offset, (Py_ssize_t)size);
}

static void write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *bytes, off_t offset,
                      struct fuse_file_info *file)
{
    const struct fuse_buf *first = &bytes->buf[0];
    /* Of the open file, or of this one write (RWF_DSYNC, RWF_SYNC). */
    int synchronous = file->flags & (O_SYNC | O_DSYNC);

    if (first->flags & FUSE_BUF_IS_FD) /* a pipe, of a kernel that splices; then no request was taken in advance */
        pyfuse3.write_buf(req, ino, bytes, offset, file);
    else if (synchronous || !request_write(req, file->fh, first->mem, first->size, offset))
        request_start(req, "write", "(KLy#O)", (unsigned long long)file->fh, (long long)offset,
                      (const char *)first->mem, (Py_ssize_t)first->size, synchronous ? Py_True : Py_False);
}

static void lseek_(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *file)
{
    request_start(req, "lseek", "(KLi)", (unsigned long long)file->fh, (long long)offset, whence);
}

static void fallocate_(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                       struct fuse_file_info *file)
{
    request_start(req, "fallocate", "(KiLL)", (unsigned long long)file->fh, mode, (long long)offset, (long long)length);
}

static void copy_file_range_(fuse_req_t req, fuse_ino_t ino_in, off_t offset_in, struct fuse_file_info *in,
                             fuse_ino_t ino_out, off_t offset_out, struct fuse_file_info *out, size_t length, int flags)
{
    request_start(req, "copy_file_range", "(KLKLn)", (unsigned long long)in->fh, (long long)offset_in,
                  (unsigned long long)out->fh, (long long)offset_out, (Py_ssize_t)length);
}

__attribute__((visibility("default"))) struct fuse_session *
fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size, void *userdata)
{
    new_session *libfuse = (new_session *)dlsym(RTLD_NEXT, "fuse_session_new");
    struct fuse_lowlevel_ops ops = {0};

    if (libfuse == NULL) {
        errno = ENOSYS;
        return NULL;
    }
    if (size > sizeof ops) /* of a newer libfuse than this was compiled with */
        return libfuse(args, op, size, userdata);
    memcpy(&ops, op, size);
    pyfuse3 = ops;
    ops.init = init;
    if (ops.getxattr)
        ops.getxattr = getxattr;
    if (operations) {
        ops.lseek = lseek_;
        ops.fallocate = fallocate_;
        ops.copy_file_range = copy_file_range_;
        if (ops.read)
            ops.read = read_;
        if (ops.write_buf)
            ops.write_buf = write_buf;
    }
    return libfuse(args, &ops, sizeof ops, userdata);
}

/* Whether pyfuse3 has no part in the request that was received. */
static int ours(const struct fuse_buf *buf)
{
    enum { READ = 15, WRITE = 16 }; /* linux/fuse.h */
    uint32_t opcode;                /* the second word of a request */

    if (!operations || (buf->flags & FUSE_BUF_IS_FD) || buf->size < 2 * sizeof opcode)
        return 0;
    memcpy(&opcode, (const char *)buf->mem + sizeof opcode, sizeof opcode);
    return opcode == READ || opcode == WRITE;
}

/* Where pyfuse3 receives a request: reads and writes are answered here, one after the other, before it gets one that it
 * has a part in. It would go through its lock and a round of the event loop for each.
 */
__attribute__((visibility("default"))) int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
    enum { IN_A_ROW = 64, MILLISECONDS = 5 }; /* then the event loop has its turn */
    /* For the next one of a program that has one under way at a time; too short to be noticed elsewhere. */
    const struct timespec patience = {0, 50 * 1000};
    static receive *libfuse;
    struct pollfd readable = {fuse_session_fd(session), POLLIN, 0};
    struct timespec begin, now;
    long spent;
    int result;

    if (libfuse == NULL) {
        libfuse = (receive *)dlsym(RTLD_NEXT, "fuse_session_receive_buf");
        if (libfuse == NULL)
            return -ENOSYS;
        /* A request that the loop was woken for is gone when its program was killed meanwhile. The read for it would stop
         * the whole daemon until the next one comes. */
        fcntl(readable.fd, F_SETFL, fcntl(readable.fd, F_GETFL) | O_NONBLOCK);
    }
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < IN_A_ROW; i++) {
        result = libfuse(session, buf);
        if (result == -EAGAIN)
            break;
        if (result <= 0 || !ours(buf))
            return result;
        fuse_session_process_buf(session, buf);
        Py_BEGIN_ALLOW_THREADS
        result = ppoll(&readable, 1, &patience, NULL);
        Py_END_ALLOW_THREADS
        clock_gettime(CLOCK_MONOTONIC, &now);
        spent = (now.tv_sec - begin.tv_sec) * 1000 + (now.tv_nsec - begin.tv_nsec) / 1000000;
        if (result <= 0 || spent >= MILLISECONDS || fuse_session_exited(session))
            break;
    }
    return -EINTR; /* nothing for pyfuse3; it will wait for more */
}

/* Requests of 1 MiB come and go by the hundred each second. By default glibc maps each buffer anew and unmaps it, so that
 * the kernel clears its 256 pages one fault at a time. Here they stay in the heap, the first part of which is in huge
 * pages where the kernel gives them for the asking: the daemon then takes 12 % less processor time for a write.
 */
static void keep_buffers(void)
{
    enum { BLOCKS = 4 };
    const size_t largest = 32 << 20, huge = 2 << 20; /* of what may come from the heap, and of a page */
    void *blocks[BLOCKS];

    mallopt(M_MMAP_THRESHOLD, largest);
    mallopt(M_TRIM_THRESHOLD, 2 * BLOCKS * largest);
    for (int i = 0; i < BLOCKS; i++) {
        blocks[i] = malloc(largest / 2);
        if (blocks[i]) {
            uintptr_t begin = ((uintptr_t)blocks[i] + huge - 1) & ~(huge - 1);
            uintptr_t end = ((uintptr_t)blocks[i] + largest / 2) & ~(huge - 1);
            madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* or not, if it is not for the asking */
        }
    }
    for (int i = 0; i < BLOCKS; i++)
        free(blocks[i]);
}

static PyObject *py_configure(PyObject *module, PyObject *args)
{
    PyObject *asked;

    if (!PyArg_ParseTuple(args, "IO", &max_background, &asked))
        return NULL;
    Py_XSETREF(operations, Py_NewRef(asked));
    keep_buffers();
    Py_RETURN_NONE;
}

static PyObject *py_hooked(PyObject *module, PyObject *unused)
{
    return PyBool_FromLong(agreed);
}

static PyMethodDef methods[] = {
    {"configure", py_configure, METH_VARARGS, "configure(max_background, operations): what the next mount asks the kernel for, and who answers it."},
    {"hooked", py_hooked, METH_NOARGS, "Whether the mount's handshake went through here."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fuse_session", "What pyfuse3 leaves out of its session.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_fuse_session(void)
{
    PyObject *module;

    if (PyType_Ready(&request_type) < 0)
        return NULL;
    module = PyModule_Create(&definition);
    if (module && PyModule_AddType(module, &held_read_type) < 0)
        Py_CLEAR(module);
    return module;
}
