/* A disk that fails: preloaded into a process (LD_PRELOAD), it lets the calls that write below a folder fail.

   faulty_disk_arm(folder, at, error, and_all_after): the at-th such call, counted from 1, returns `error`,
   and all after it too where that is asked for; at = 0 only counts. Reading and removing are never harmed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX], failed[PATH_MAX + 32];
static long fail_at, calls, fails;
static int fail_with, fails_on;

void faulty_disk_arm(const char *folder, long at, int error, int and_all_after) {
    snprintf(below, sizeof below, "%s", folder);
    fail_at = at, fail_with = error, fails_on = and_all_after, calls = fails = 0, failed[0] = 0;
}
long faulty_disk_calls(void) { return calls; }
long faulty_disk_fails(void) { return fails; }
const char *faulty_disk_failed(void) { return failed; } /* the first call that failed, and on what */

static int fails_now(const char *call, const char *path) {
    size_t length = strlen(below);
    if (!length || strncmp(path, below, length) || (path[length] && path[length] != '/')) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!fail_at || number < fail_at || (number > fail_at && !fails_on)) return 0;
    if (__atomic_add_fetch(&fails, 1, __ATOMIC_SEQ_CST) == 1) snprintf(failed, sizeof failed, "%s %s", call, path);
    errno = fail_with;
    return 1;
}

static int fails_on_descriptor(const char *call, int descriptor) {
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return fails_now(call, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_DESCRIPTOR(type, name, declared, given) \
    type name declared { return fails_on_descriptor(#name, descriptor) ? -1 : NEXT(name) given; }
#define ON_PATH(name, declared, given, path) \
    int name declared { return fails_now(#name, path) ? -1 : NEXT(name) given; }

ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
ON_DESCRIPTOR(ssize_t, writev, (int descriptor, const struct iovec *data, int count), (descriptor, data, count))
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t at),
              (descriptor, data, size, at))
ON_DESCRIPTOR(int, fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor))
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), path)
ON_PATH(rename, (const char *from, const char *to), (from, to), to)
ON_PATH(renameat, (int from_folder, const char *from, int to_folder, const char *to),
        (from_folder, from, to_folder, to), to)

/* Opening fails only where it would create the file. */
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & O_CREAT && access(path, F_OK) && fails_now(#name, path)) return -1; \
        return NEXT(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        int creates = mode[0] != 'r' && access(path, F_OK); \
        return creates && fails_now(#name, path) ? NULL : NEXT(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)
