# cython: language_level=3
"""A thin cover of libiscsi's asynchronous calls: sends commands, moves bytes, decides nothing.

It exists because libiscsi has no Python binding that is asynchronous, and because block data must not be copied on
its way: a read lands in the very bytes object that the caller gets, a write leaves from the caller's own buffer.
Retries, reconnects, deadlines and the meaning of errors are Python, in backends/iscsi_session.py.

Concurrency: one thread, the one of the event loop. libiscsi calls back only inside `service` and `close`, with the
interpreter lock held; the callbacks do no more than note the outcome, and `service` and `close` return the finished
commands. No code of the caller therefore ever runs inside libiscsi, which would not stand it: it cancels commands
`while` its queue is not empty, and a callback that queued another one would never let it end.

What libiscsi 1.19 does that must be known here (lib/socket.c, lib/connect.c, lib/pdu.c):

- With noautoreconnect, `iscsi_service` answers a lost connection by cancelling everything and returning 0; calling it
  again could then touch a freed task (its outqueue_current may still be a Data-Out of it). So the first
  cancellation, too, means `lost`, and a lost context is only good for `close`.
- `iscsi_destroy_context` calls back for the commands under way only while logged in; the others are finished by us.
- A command that failed early may have Data-Outs queued that still point to its task and its buffer. Failed writes are
  therefore kept until nothing is left to send, or the context is gone.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t
import errno as errnos


cdef extern from "<poll.h>":
    int C_POLLIN "POLLIN"
    int C_POLLOUT "POLLOUT"


cdef extern from "<iscsi/iscsi.h>":
    struct iscsi_context:
        pass
    struct iscsi_data:
        pass
    struct iscsi_target_portal:
        iscsi_target_portal *next
        const char *portal
    struct iscsi_discovery_address:
        iscsi_discovery_address *next
        const char *target_name
        iscsi_target_portal *portals
    enum iscsi_session_type:
        ISCSI_SESSION_DISCOVERY
        ISCSI_SESSION_NORMAL
    enum iscsi_header_digest:
        ISCSI_HEADER_DIGEST_NONE
        ISCSI_HEADER_DIGEST_CRC32C_NONE
        ISCSI_HEADER_DIGEST_CRC32C
    enum scsi_status:
        SCSI_STATUS_GOOD
        SCSI_STATUS_CHECK_CONDITION
        SCSI_STATUS_BUSY
        SCSI_STATUS_RESERVATION_CONFLICT
        SCSI_STATUS_TASK_SET_FULL
        SCSI_STATUS_TASK_ABORTED
        SCSI_STATUS_REDIRECT
        SCSI_STATUS_CANCELLED
        SCSI_STATUS_ERROR
    ctypedef void (*iscsi_command_cb)(iscsi_context *, int, void *, void *) noexcept
    iscsi_context *iscsi_create_context(const char *)
    int iscsi_destroy_context(iscsi_context *)
    int iscsi_set_targetname(iscsi_context *, const char *)
    int iscsi_set_session_type(iscsi_context *, iscsi_session_type)
    int iscsi_set_header_digest(iscsi_context *, iscsi_header_digest)
    int iscsi_set_initiator_username_pwd(iscsi_context *, const char *, const char *)
    int iscsi_set_target_username_pwd(iscsi_context *, const char *, const char *)
    int iscsi_set_isid_random(iscsi_context *, uint32_t, uint32_t)
    void iscsi_set_noautoreconnect(iscsi_context *, int)
    int iscsi_get_fd(iscsi_context *)
    int iscsi_which_events(iscsi_context *)
    int iscsi_service(iscsi_context *, int)
    int iscsi_out_queue_length(iscsi_context *)
    int iscsi_is_logged_in(iscsi_context *)
    const char *iscsi_get_error(iscsi_context *)
    const char *iscsi_get_target_address(iscsi_context *)
    int iscsi_connect_async(iscsi_context *, const char *, iscsi_command_cb, void *)
    int iscsi_login_async(iscsi_context *, iscsi_command_cb, void *)
    int iscsi_logout_async(iscsi_context *, iscsi_command_cb, void *)
    int iscsi_discovery_async(iscsi_context *, iscsi_command_cb, void *)


cdef extern from "<iscsi/scsi-lowlevel.h>":
    struct scsi_iovec:
        void *iov_base
        size_t iov_len
    struct scsi_sense:
        unsigned char error_type
        int key
        int ascq
    enum scsi_residual:
        SCSI_RESIDUAL_UNDERFLOW
    struct scsi_task:
        scsi_residual residual_status
        size_t residual
        scsi_sense sense
    enum scsi_xfer_dir:
        SCSI_XFER_NONE
        SCSI_XFER_READ
        SCSI_XFER_WRITE
    scsi_task *scsi_create_task(int, unsigned char *, int, int)
    void scsi_free_scsi_task(scsi_task *)
    void scsi_task_set_iov_in(scsi_task *, scsi_iovec *, int)
    void scsi_task_set_iov_out(scsi_task *, scsi_iovec *, int)
    int iscsi_scsi_command_async(iscsi_context *, int, scsi_task *, iscsi_command_cb, iscsi_data *, void *)


POLLIN = C_POLLIN
POLLOUT = C_POLLOUT
PENDING = -1
GOOD = <int>SCSI_STATUS_GOOD
CHECK_CONDITION = <int>SCSI_STATUS_CHECK_CONDITION
BUSY = <int>SCSI_STATUS_BUSY
RESERVATION_CONFLICT = <int>SCSI_STATUS_RESERVATION_CONFLICT
TASK_SET_FULL = <int>SCSI_STATUS_TASK_SET_FULL
TASK_ABORTED = <int>SCSI_STATUS_TASK_ABORTED
REDIRECT = <int>SCSI_STATUS_REDIRECT
CANCELLED = <int>SCSI_STATUS_CANCELLED

cdef dict HEADER_DIGESTS = {
    "none": <int>ISCSI_HEADER_DIGEST_NONE,
    "prefer": <int>ISCSI_HEADER_DIGEST_CRC32C_NONE,
    "crc32c": <int>ISCSI_HEADER_DIGEST_CRC32C,
}


def new_buffer(Py_ssize_t size):
    """A bytes object of `size` bytes for reads to land in. Its content is undefined until they have."""
    return PyBytes_FromStringAndSize(NULL, size)


# Cython would clear the view without releasing it when the garbage collector takes a command in a cycle.
@cython.no_gc_clear
cdef class Command:
    """One SCSI command, or one step of a session. May be submitted again once it has finished.

    `data[start:start + length]` is written; it must not change until the command has finished or was detached. A read
    fills `into[start:start + length]`, where `into` comes from `new_buffer` and nobody has seen it yet.
    """

    cdef public object owner
    cdef readonly int status  # PENDING, a SCSI status, REDIRECT or CANCELLED
    cdef readonly int sense_key
    cdef readonly int ascq  # additional sense code and qualifier, as 0xAAQQ
    cdef readonly bint deferred  # the sense tells of an earlier command (SPC-4 4.5.5); this one was not executed
    cdef readonly Py_ssize_t residual  # bytes that were asked for and did not come
    cdef readonly str error  # libiscsi's own words, when the status is not GOOD
    cdef readonly object result  # of a discovery: list of (target name, list of portals)
    cdef bytes cdb
    cdef int lun
    cdef int direction
    cdef bytes buffer  # what a read lands in, or a detached write leaves from
    cdef Py_buffer view
    cdef bint viewed
    cdef scsi_iovec iov
    cdef scsi_task *task
    cdef Context context

    def __cinit__(self, int lun, bytes cdb, object owner=None, *, bytes into=None, object data=None,
                  Py_ssize_t start=0, Py_ssize_t length=0):
        if len(cdb) > 16:
            raise ValueError("a command has at most 16 bytes")
        self.lun = lun
        self.cdb = cdb
        self.owner = owner
        self.status = -1
        self.direction = SCSI_XFER_NONE
        if start < 0 or length < 0 or length > 0x7FFFFFFF:
            raise ValueError("a transfer is 0 to 2 GiB long")
        if into is not None:
            if start + length > PyBytes_GET_SIZE(into):
                raise ValueError("a read goes past the end of its buffer")
            self.direction = SCSI_XFER_READ
            self.buffer = into
            self.iov.iov_base = PyBytes_AS_STRING(into) + start
        elif data is not None:
            PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
            self.viewed = True
            if start + length > self.view.len:
                raise ValueError("a write goes past the end of its buffer")
            self.direction = SCSI_XFER_WRITE
            self.iov.iov_base = <char *>self.view.buf + start
        self.iov.iov_len = length

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)

    def detach(self):
        """Give the caller's buffer back for good: what is still to be written leaves from a copy.

        libiscsi looks at the iovec anew each time it writes to the socket, so it may be moved under it.
        """
        if self.viewed:
            if self.context is not None or self.status not in (-1, <int>SCSI_STATUS_GOOD):
                self.buffer = PyBytes_FromStringAndSize(<char *>self.iov.iov_base, self.iov.iov_len)
                self.iov.iov_base = PyBytes_AS_STRING(self.buffer)
            else:
                self.iov.iov_base = NULL
                self.iov.iov_len = 0
            self.viewed = False
            PyBuffer_Release(&self.view)

    cdef void finish(self, int status) noexcept:
        cdef Context context = self.context
        cdef scsi_task *task = self.task
        if self.status != -1 or context is None:  # libiscsi may report one login twice
            return
        self.status = status
        self.context = None
        self.task = NULL
        if task != NULL:
            if task.residual_status == SCSI_RESIDUAL_UNDERFLOW:
                self.residual = task.residual
            if status == SCSI_STATUS_CHECK_CONDITION:
                self.sense_key = task.sense.key
                self.ascq = task.sense.ascq
                self.deferred = task.sense.error_type & 1
        if status != SCSI_STATUS_GOOD:
            self.error = context.error
            if status == SCSI_STATUS_CANCELLED:
                context.lost = True
        if task != NULL:
            if status != SCSI_STATUS_GOOD and self.direction == SCSI_XFER_WRITE:
                context.keep(self, task)
            else:
                scsi_free_scsi_task(task)
        context.pending.discard(self)
        context.finished.append(self)
        Py_DECREF(self)


cdef class Kept:
    """The task of a failed write, and the command whose buffer it points to."""

    cdef Command command
    cdef scsi_task *task

    def __dealloc__(self):
        scsi_free_scsi_task(self.task)


cdef void on_finished(iscsi_context *_, int status, void *data, void *private_data) noexcept:
    (<Command>private_data).finish(status)


cdef void on_discovered(iscsi_context *_, int status, void *data, void *private_data) noexcept:
    cdef Command command = <Command>private_data
    cdef iscsi_discovery_address *target = <iscsi_discovery_address *>data
    cdef iscsi_target_portal *portal
    if status == SCSI_STATUS_GOOD:
        command.result = []
        while target != NULL:
            portals = []
            portal = target.portals
            while portal != NULL:
                portals.append(portal.portal.decode("utf-8", "replace"))
                portal = portal.next
            command.result.append((target.target_name.decode("utf-8", "replace"), portals))
            target = target.next
    command.finish(status)


cdef class Context:
    """One connection: made, used and closed once. There is no reconnecting; make another."""

    cdef iscsi_context *ctx
    cdef readonly bint lost  # only `close` may follow
    cdef bint logged_in
    cdef bint leaving
    cdef set pending
    cdef list finished
    cdef list kept
    cdef list steps  # connect, login, ...: libiscsi holds pointers to them to the end

    # Not `str`: Cython would refuse subclasses, such as a secret that does not show itself.
    def __cinit__(self, initiator_name, *, target_name=None, header_digest="none", tuple isid=(0, 0),
                  username="", password="", target_username="", target_password=""):
        self.pending = set()
        self.finished = []
        self.kept = []
        self.steps = []
        self.ctx = iscsi_create_context(c_string(initiator_name, "initiator name"))
        if self.ctx == NULL:
            raise MemoryError("libiscsi made no context")
        iscsi_set_noautoreconnect(self.ctx, 1)
        iscsi_set_isid_random(self.ctx, isid[0], isid[1])
        iscsi_set_header_digest(self.ctx, HEADER_DIGESTS[header_digest])
        if target_name is None:
            iscsi_set_session_type(self.ctx, ISCSI_SESSION_DISCOVERY)
        else:
            iscsi_set_session_type(self.ctx, ISCSI_SESSION_NORMAL)
            iscsi_set_targetname(self.ctx, c_string(target_name, "target name"))
        if username:
            iscsi_set_initiator_username_pwd(
                self.ctx, c_string(username, "CHAP user name"), c_string(password, "CHAP password"))
        if target_username:
            iscsi_set_target_username_pwd(
                self.ctx, c_string(target_username, "mutual CHAP user name"),
                c_string(target_password, "mutual CHAP password"))

    def __dealloc__(self):
        # Commands under way hold a reference to the context: none is left when we come here.
        if self.ctx != NULL:
            iscsi_destroy_context(self.ctx)

    cdef void keep(self, Command command, scsi_task *task) noexcept:
        cdef Kept kept = Kept.__new__(Kept)
        kept.command = command
        kept.task = task
        self.kept.append(kept)

    cdef Command step(self):
        cdef Command command = Command(0, b"")
        self.steps.append(command)
        self.begin(command)
        return command

    cdef begin(self, Command command):
        """libiscsi holds a bare pointer to the command from here to `finish`: keep it alive, whatever else happens."""
        command.context = self
        self.pending.add(command)
        Py_INCREF(command)

    cdef started(self, Command command, int result):
        if result != 0:
            self.pending.discard(command)
            command.context = None
            Py_DECREF(command)
            raise OSError(errnos.EIO, self.error)
        return command

    cdef int check(self) except -1:
        if self.ctx == NULL or self.lost:
            raise OSError(errnos.ENOTCONN, "the iSCSI connection is gone")
        return 0

    def connect(self, portal):
        """Begin to connect to a numeric address (a name would be resolved here and now, blocking the loop)."""
        self.check()
        cdef Command command = self.step()
        return self.started(
            command, iscsi_connect_async(self.ctx, c_string(portal, "portal"), on_finished, <void *>command))

    def login(self):
        self.check()
        cdef Command command = self.step()
        return self.started(command, iscsi_login_async(self.ctx, on_finished, <void *>command))

    def discover(self):
        self.check()
        cdef Command command = self.step()
        return self.started(command, iscsi_discovery_async(self.ctx, on_discovered, <void *>command))

    def logout(self):
        self.check()
        self.leaving = True
        cdef Command command = self.step()
        return self.started(command, iscsi_logout_async(self.ctx, on_finished, <void *>command))

    def submit(self, Command command not None):
        """Queue a command; `service(POLLOUT)` sends it. OSError when the connection is gone."""
        self.check()
        if command.context is not None:
            raise RuntimeError("the command is under way already")
        cdef scsi_task *task = scsi_create_task(
            <int>len(command.cdb), <unsigned char *>PyBytes_AS_STRING(command.cdb), command.direction,
            <int>command.iov.iov_len)
        if task == NULL:
            raise MemoryError
        if command.direction == SCSI_XFER_READ:
            scsi_task_set_iov_in(task, &command.iov, 1)
        elif command.direction == SCSI_XFER_WRITE:
            scsi_task_set_iov_out(task, &command.iov, 1)
        command.status = -1
        command.residual = command.sense_key = command.ascq = 0
        command.error = None
        if iscsi_scsi_command_async(self.ctx, command.lun, task, on_finished, NULL, <void *>command) != 0:
            scsi_free_scsi_task(task)
            raise OSError(errnos.ENOTCONN, self.error)
        command.task = task
        self.begin(command)

    def service(self, int events):
        """Read and write what the socket allows; return the commands that finished."""
        if self.ctx == NULL or self.lost:
            return self.take()
        if iscsi_service(self.ctx, events) != 0:
            self.lost = True
        elif iscsi_is_logged_in(self.ctx):
            self.logged_in = True
        elif self.logged_in and not self.leaving:
            # Logged out at the target's wish (RFC 7143 11.9.1): libiscsi drops the commands under way in silence.
            self.lost = True
        if self.kept and not self.lost and not self.writing:
            self.kept.clear()
        return self.take()

    cdef list take(self):
        cdef list finished = self.finished
        self.finished = []
        return finished

    def close(self):
        """Drop the connection and whatever is under way; return the commands that this finished, as CANCELLED.

        Whoever waits for `fd` must be told before.
        """
        cdef iscsi_context *ctx = self.ctx
        cdef Command command
        if ctx != NULL:
            self.lost = True
            iscsi_destroy_context(ctx)
            self.ctx = NULL
            for command in list(self.pending):
                command.finish(SCSI_STATUS_CANCELLED)
            self.kept.clear()
        return self.take()

    @property
    def fd(self):
        return -1 if self.ctx == NULL else iscsi_get_fd(self.ctx)

    @property
    def writing(self):
        """Whether something waits for the socket to become writable."""
        return self.ctx != NULL and (iscsi_which_events(self.ctx) & C_POLLOUT) != 0

    @property
    def error(self):
        return "" if self.ctx == NULL else iscsi_get_error(self.ctx).decode("utf-8", "replace").strip()

    @property
    def redirected_to(self):
        """The portal that a login answered with REDIRECT sends us to."""
        return "" if self.ctx == NULL else iscsi_get_target_address(self.ctx).decode("utf-8", "replace")


cdef bytes c_string(text, str what):
    """libiscsi copies names into arrays of 256 bytes, cutting what is longer: refuse that instead."""
    cdef bytes encoded = text.encode()
    if len(encoded) > 255 or b"\0" in encoded:
        raise OSError(errnos.EINVAL, f"the {what} is longer than 255 bytes or contains a NUL")
    return encoded
