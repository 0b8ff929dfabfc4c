/* Where the bytes of a read go when they do not pass through Python: from a backend's library straight to whoever asked.
 *
 * A sink travels through Python as a capsule of this name. Who has it owes one call of `done`, from any thread, with or
 * without the GIL, after which it is gone: with `status` bytes at `data` (the reader's own, unchanged until `done` returns),
 * or a negative errno. It returns whether it keeps the data, which it then frees (malloc's) when it is done with it.
 */
#ifndef VOLFS_SINK_H
#define VOLFS_SINK_H

#include <sys/types.h>

#define SINK "volfs.sink"

struct sink {
    int (*done)(struct sink *sink, char *data, ssize_t status);
};

#endif
