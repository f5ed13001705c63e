/* Reads that fail as those of a disk or of a network file system: preloaded into a process (LD_PRELOAD), with READ_ERRNO.

   READ_ERRORS="n/m": the first n of every m calls of preadv, by which training reads.
   LOST_IN, LOST_FROM, LOST_TO: these bytes of this file, whoever reads it on; those before them come. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int calls;

static int fails_now(void) {
    char *rest;
    if (!getenv("READ_ERRORS")) return 0;
    long failing = strtol(getenv("READ_ERRORS"), &rest, 10), of = strtol(rest + 1, NULL, 10);
    errno = atoi(getenv("READ_ERRNO"));
    return calls++ % of < failing;
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) {
    ssize_t (*real)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, "preadv64");
    return fails_now() ? -1 : real(fd, parts, count, at);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
    ssize_t (*real)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, "preadv64v2");
    return fails_now() ? -1 : real(fd, parts, count, at, flags);
}

static int is_of_lost_file(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!getenv("LOST_IN") || length < 0) return 0;
    path[length] = 0;
    return !strcmp(path, getenv("LOST_IN"));
}

ssize_t read(int fd, void *data, size_t size) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    if (!is_of_lost_file(fd)) return real(fd, data, size);
    off_t at = lseek(fd, 0, SEEK_CUR), from = atol(getenv("LOST_FROM"));
    if (at >= atol(getenv("LOST_TO")) || at + (off_t)size <= from) return real(fd, data, size);
    if (at < from) return real(fd, data, from - at);
    errno = atoi(getenv("READ_ERRNO"));
    return -1;
}
