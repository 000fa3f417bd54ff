/* A fault layer under a process: LD_PRELOAD wraps libc's file calls for everything below one folder.
 *
 *   KVSHIM_ROOT  the folder; without it nothing is wrapped
 *   KVSHIM_PLAN  optional: a file with `struct plan`, shared with the test, which changes it while we run
 *   KVSHIM_LOG   optional: every change is appended here, in the order in which it took place
 *
 * shim.py is the other side. The order of the log is true across threads and processes: a change and its record are one
 * step under a lock. No sync reaches the disk: what a power cut would leave is worked out from the log (power_cut.py),
 * and the page cache survives everything else that tests do.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define ALIAS(name) __attribute__((visibility("default"), alias(#name)))
#define LONGEST 4096

enum op { CREATE = 1, WRITE = 2, TRUNCATE = 4, ALLOCATE = 8, SYNC = 16, MKDIR = 32, RMDIR = 64, UNLINK = 128,
          RENAME = 256, LINK = 512, OPEN = 1024, READ = 2048 };
enum action { OFF, FAIL, SHORT, TORN, TORN_KILL, KILL, KILL_AFTER, SLOW, FLIP };

struct rule {
    uint32_t ops, action;
    int32_t value;   /* FAIL, TORN: errno; SLOW: milliseconds */
    uint32_t repeat; /* also every call after the nth */
    uint64_t nth, seen, fired;
    char path[88]; /* a part of the path; empty: all */
};
struct plan {
    int64_t budget, used; /* bytes that the folder may hold; -1: no bound */
    struct rule rules[4];
};
struct record {
    uint32_t magic, kind;
    uint64_t inode;
    int64_t offset;
    uint32_t path_length, other_length;
    uint64_t data_length;
} __attribute__((packed));

static const char *root;
static size_t root_length;
static struct plan *plan;
static int log_fd = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* Also in a forked child: a lock on a file that parent and child share would be one lock for both. */
static void open_log(void) {
    const char *path = getenv("KVSHIM_LOG");
    if (path == NULL) return;
    if (log_fd >= 0) close(log_fd);
    log_fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_APPEND | O_CLOEXEC, 0);
    if (log_fd < 0) abort();
}

__attribute__((constructor)) static void start(void) {
    const char *plan_path = getenv("KVSHIM_PLAN");
    root = getenv("KVSHIM_ROOT");
    if (root == NULL) return;
    root_length = strlen(root);
    if (plan_path != NULL) {
        int fd = syscall(SYS_openat, AT_FDCWD, plan_path, O_RDWR | O_CLOEXEC, 0);
        void *shared = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (fd < 0 || shared == MAP_FAILED) abort();
        close(fd);
        plan = shared;
    }
    open_log();
    pthread_atfork(NULL, NULL, open_log);
}

/* What is ours */

static int below_root(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

/* The name of an open file; 0 when it is not ours. */
static int name_of(int fd, char *out) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, out, LONGEST - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return below_root(out);
}

static int ours(int fd, char *name, struct stat *status) {
    if (root == NULL) return 0;
    int kept = errno;
    int found = fstat(fd, status) == 0 && (S_ISREG(status->st_mode) || S_ISDIR(status->st_mode)) && name_of(fd, name);
    errno = kept;
    return found;
}

static int resolve(int folder, const char *path, char *out) {
    if (root == NULL || path == NULL) return 0;
    int kept = errno, length;
    if (path[0] == '/') {
        length = snprintf(out, LONGEST, "%s", path);
    } else {
        char base[LONGEST];
        if (folder == AT_FDCWD ? getcwd(base, sizeof base) == NULL : !name_of(folder, base)) {
            errno = kept;
            return 0;
        }
        length = snprintf(out, LONGEST, "%s/%s", base, path);
    }
    errno = kept;
    return length < LONGEST && below_root(out);
}

/* The log */

static void lock(void) {
    if (log_fd < 0) return;
    int kept = errno;
    pthread_mutex_lock(&mutex);
    while (flock(log_fd, LOCK_EX) != 0) {}
    errno = kept;
}

/* Between two steps of the log, so that the log is whole. */
static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void unlock(int after) {
    if (after) die();
    if (log_fd < 0) return;
    int kept = errno;
    flock(log_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = kept;
}

static void note(enum op kind, uint64_t inode, int64_t offset, const char *path, const char *other, const void *data,
                 size_t size) {
    if (log_fd < 0) return;
    int kept = errno;
    struct record record = {0x4b56424b, kind, inode, offset, strlen(path), strlen(other), size};
    struct iovec parts[4] = {{&record, sizeof record}, {(void *)path, record.path_length},
                             {(void *)other, record.other_length}, {(void *)data, size}};
    ssize_t whole = sizeof record + record.path_length + record.other_length + size;
    if (syscall(SYS_writev, log_fd, parts, 4) != whole) abort();
    errno = kept;
}

static uint64_t inode_at(const char *path) {
    struct stat status;
    return fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) == 0 ? status.st_ino : 0;
}

/* Faults */

/* The action for this call, SLOW and KILL done already. */
static enum action judge(enum op op, const char *path, int *value) {
    if (plan == NULL) return OFF;
    for (struct rule *rule = plan->rules; rule < plan->rules + 4; rule++) {
        enum action action = rule->action;
        if (!(rule->ops & op) || (rule->path[0] && strstr(path, rule->path) == NULL)) continue;
        uint64_t count = __atomic_add_fetch(&rule->seen, 1, __ATOMIC_SEQ_CST);
        if (action == OFF || (rule->repeat ? count < rule->nth : count != rule->nth)) continue;
        __atomic_add_fetch(&rule->fired, 1, __ATOMIC_SEQ_CST);
        *value = rule->value;
        if (action == KILL) {
            lock();
            die();
        }
        if (action != SLOW) return action;
        struct timespec pause_ = {rule->value / 1000, rule->value % 1000 * 1000000L};
        nanosleep(&pause_, NULL);
    }
    return OFF;
}

/* 1: the call fails, errno is set. */
static int refused(enum op op, const char *path, int *after) {
    int value = 0;
    enum action action = judge(op, path, &value);
    *after = action == KILL_AFTER || action == TORN_KILL;
    if (action != FAIL && action != TORN) return 0;
    errno = value;
    return 1;
}

static void grow(int64_t bytes) {
    if (plan != NULL && plan->budget >= 0) __atomic_add_fetch(&plan->used, bytes, __ATOMIC_SEQ_CST);
}

static int64_t room(void) {
    int64_t left = plan->budget - plan->used;
    return left > 0 ? left : 0;
}

static int64_t growth(const struct stat *status, int64_t end) { return end > status->st_size ? end - status->st_size : 0; }

static int no_room(int64_t bytes) {
    if (plan == NULL || plan->budget < 0 || bytes <= room()) return 0;
    errno = ENOSPC;
    return 1;
}

/* What the folder loses with this name. */
static void shrink_by(const char *path) {
    struct stat status;
    if (plan == NULL || plan->budget < 0 || fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW) != 0) return;
    if (S_ISREG(status.st_mode) && status.st_nlink == 1) grow(-status.st_size);
}

/* Opening */

static int do_open(int folder, const char *path, int flags, mode_t mode) {
    char name[LONGEST];
    struct stat before, status;
    int after, creates = (flags & O_CREAT) != 0;
    if (!resolve(folder, path, name)) return syscall(SYS_openat, folder, path, flags, mode);
    if (refused(creates || flags & O_TRUNC ? CREATE : OPEN, name, &after)) return -1;
    lock();
    int existed = fstatat(AT_FDCWD, name, &before, 0) == 0;
    int fd = syscall(SYS_openat, folder, path, flags, mode);
    if (fd >= 0 && creates && !existed && fstat(fd, &status) == 0) note(CREATE, status.st_ino, 0, name, "", NULL, 0);
    if (fd >= 0 && existed && flags & O_TRUNC && before.st_size) {
        grow(-before.st_size);
        note(TRUNCATE, before.st_ino, 0, name, "", NULL, 0);
    }
    unlock(after);
    return fd;
}

static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

EXPORT int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return do_open(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) ALIAS(open);

EXPORT int openat(int folder, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return do_open(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) ALIAS(openat);

EXPORT int __open_2(const char *path, int flags) { return do_open(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) ALIAS(__open_2);
EXPORT int __openat_2(int folder, const char *path, int flags) { return do_open(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) ALIAS(__openat_2);
EXPORT int creat(const char *path, mode_t mode) {
    return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
int creat64(const char *path, mode_t mode) ALIAS(creat);

/* Writing */

static ssize_t raw_write(int fd, const void *data, size_t size, off_t offset) {
    return offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
}

/* offset -1: where the file stands. */
static ssize_t do_write(int fd, const void *data, size_t size, off_t offset) {
    char name[LONGEST];
    struct stat status;
    int value = 0;
    if (size == 0 || !ours(fd, name, &status)) return raw_write(fd, data, size, offset);
    enum action action = judge(WRITE, name, &value);
    if (action == FAIL) {
        errno = value;
        return -1;
    }
    if (action == SHORT || action == TORN || action == TORN_KILL) size = (size + 1) / 2;
    lock();
    fstat(fd, &status);
    int64_t begin = offset >= 0                            ? offset
                    : fcntl(fd, F_GETFL) & O_APPEND        ? status.st_size
                                                           : lseek(fd, 0, SEEK_CUR);
    if (plan != NULL && plan->budget >= 0 && growth(&status, begin + (int64_t)size) > room()) {
        int64_t fits = status.st_size + room() - begin;
        size = fits > 0 ? (size_t)fits : 0;
    }
    ssize_t written = -1;
    errno = ENOSPC;
    if (size > 0) written = raw_write(fd, data, size, offset);
    if (written > 0) {
        grow(growth(&status, begin + written));
        note(WRITE, status.st_ino, begin, name, "", data, written);
    }
    unlock(action == KILL_AFTER || action == TORN_KILL);
    if (action == TORN) {
        errno = value;
        return -1;
    }
    return written;
}

static ssize_t do_writev(int fd, const struct iovec *parts, int count, off_t offset) {
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    char *data = malloc(size ? size : 1), *end = data;
    if (data == NULL) return -1;
    for (int i = 0; i < count; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t written = do_write(fd, data, size, offset);
    free(data);
    return written;
}

EXPORT ssize_t write(int fd, const void *data, size_t size) { return do_write(fd, data, size, -1); }
EXPORT ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return do_write(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) ALIAS(pwrite);
EXPORT ssize_t writev(int fd, const struct iovec *parts, int count) {
    char name[LONGEST];
    struct stat status;
    return ours(fd, name, &status) ? do_writev(fd, parts, count, -1) : syscall(SYS_writev, fd, parts, count);
}
EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    char name[LONGEST];
    struct stat status;
    if (ours(fd, name, &status)) return do_writev(fd, parts, count, offset);
    return syscall(SYS_pwritev, fd, parts, count, offset, 0);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) ALIAS(pwritev);
EXPORT ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    char name[LONGEST];
    struct stat status;
    if (ours(fd, name, &status)) return do_writev(fd, parts, count, offset);
    return syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) ALIAS(pwritev2);

/* Copies inside the kernel: taken as a write of what then stands in the file. */
static void note_copied(int fd, const char *name, const struct stat *before, int64_t begin, ssize_t size) {
    grow(growth(before, begin + size));
    if (log_fd < 0) return;
    int readable = -1;
    char self[40], *data = malloc(size);
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    readable = syscall(SYS_openat, AT_FDCWD, self, O_RDONLY | O_CLOEXEC, 0);
    if (data == NULL || readable < 0 || syscall(SYS_pread64, readable, data, size, begin) != size) abort();
    note(WRITE, before->st_ino, begin, name, "", data, size);
    close(readable);
    free(data);
}

EXPORT ssize_t copy_file_range(int from, off_t *from_at, int to, off_t *to_at, size_t size, unsigned flags) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(to, name, &status)) return syscall(SYS_copy_file_range, from, from_at, to, to_at, size, flags);
    if (refused(WRITE, name, &after)) return -1;
    lock();
    fstat(to, &status);
    int64_t begin = to_at != NULL ? *to_at : lseek(to, 0, SEEK_CUR);
    ssize_t copied = -1;
    if (!no_room(growth(&status, begin + (int64_t)size)))
        copied = syscall(SYS_copy_file_range, from, from_at, to, to_at, size, flags);
    if (copied > 0) note_copied(to, name, &status, begin, copied);
    unlock(after);
    return copied;
}

EXPORT ssize_t sendfile(int to, int from, off_t *from_at, size_t size) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(to, name, &status)) return syscall(SYS_sendfile, to, from, from_at, size);
    if (refused(WRITE, name, &after)) return -1;
    lock();
    fstat(to, &status);
    int64_t begin = lseek(to, 0, SEEK_CUR);
    ssize_t copied = -1;
    if (plan == NULL || plan->budget < 0 || room() > 0) copied = syscall(SYS_sendfile, to, from, from_at, size);
    else errno = ENOSPC;
    if (copied > 0) note_copied(to, name, &status, begin, copied);
    unlock(after);
    return copied;
}
ssize_t sendfile64(int to, int from, off_t *from_at, size_t size) ALIAS(sendfile);

EXPORT int ftruncate(int fd, off_t size) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(fd, name, &status)) return syscall(SYS_ftruncate, fd, size);
    if (refused(TRUNCATE, name, &after) || no_room(growth(&status, size))) return -1;
    lock();
    int done = syscall(SYS_ftruncate, fd, size);
    if (done == 0) {
        grow(size - status.st_size);
        note(TRUNCATE, status.st_ino, size, name, "", NULL, 0);
    }
    unlock(after);
    return done;
}
int ftruncate64(int fd, off_t size) ALIAS(ftruncate);

EXPORT int fallocate(int fd, int mode, off_t offset, off_t size) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(fd, name, &status)) return syscall(SYS_fallocate, fd, mode, offset, size);
    if (refused(ALLOCATE, name, &after) || no_room(growth(&status, offset + size))) return -1;
    lock();
    int done = syscall(SYS_fallocate, fd, mode, offset, size);
    if (done == 0 && mode == 0 && growth(&status, offset + size)) {
        grow(growth(&status, offset + size));
        note(TRUNCATE, status.st_ino, offset + size, name, "", NULL, 0);
    }
    unlock(after);
    return done;
}
int fallocate64(int fd, int mode, off_t offset, off_t size) ALIAS(fallocate);
EXPORT int posix_fallocate(int fd, off_t offset, off_t size) {
    int kept = errno, failed = fallocate(fd, 0, offset, size) != 0 ? errno : 0;
    errno = kept;
    return failed;
}
int posix_fallocate64(int fd, off_t offset, off_t size) ALIAS(posix_fallocate);

/* Syncing */

EXPORT int fsync(int fd) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(fd, name, &status)) return syscall(SYS_fsync, fd);
    if (refused(SYNC, name, &after)) return -1;
    lock();
    note(SYNC, status.st_ino, S_ISDIR(status.st_mode), name, "", NULL, 0);
    unlock(after);
    return 0;
}
int fdatasync(int fd) ALIAS(fsync);
/* All that was written below the root is on the disk then. */
EXPORT int syncfs(int fd) {
    char name[LONGEST];
    struct stat status;
    int after;
    if (!ours(fd, name, &status)) return syscall(SYS_syncfs, fd);
    if (refused(SYNC, "the whole disk", &after)) return -1;
    lock();
    note(SYNC, 0, 2, root, "", NULL, 0);
    unlock(after);
    return 0;
}

/* Names */

EXPORT int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char old[LONGEST], new[LONGEST];
    int after;
    if (!resolve(from_folder, from, old) || !resolve(to_folder, to, new))
        return syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    if (refused(RENAME, new, &after)) return -1;
    lock();
    uint64_t inode = inode_at(old);
    if (inode != inode_at(new)) shrink_by(new);
    int done = syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    if (done == 0) note(RENAME, inode, 0, old, new, NULL, 0);
    unlock(after);
    return done;
}
EXPORT int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return renameat2(from_folder, from, to_folder, to, 0);
}
EXPORT int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

EXPORT int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char new[LONGEST];
    int after;
    if (!resolve(to_folder, to, new)) return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
    if (refused(LINK, new, &after)) return -1;
    lock();
    int done = syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
    if (done == 0) note(LINK, inode_at(new), 0, new, "", NULL, 0);
    unlock(after);
    return done;
}
EXPORT int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

EXPORT int unlinkat(int folder, const char *path, int flags) {
    char name[LONGEST];
    int after, removes_folder = flags & AT_REMOVEDIR;
    if (!resolve(folder, path, name)) return syscall(SYS_unlinkat, folder, path, flags);
    if (refused(removes_folder ? RMDIR : UNLINK, name, &after)) return -1;
    lock();
    uint64_t inode = inode_at(name);
    int64_t used = plan != NULL ? plan->used : 0;
    if (!removes_folder) shrink_by(name);
    int done = syscall(SYS_unlinkat, folder, path, flags);
    if (done == 0) note(removes_folder ? RMDIR : UNLINK, inode, 0, name, "", NULL, 0);
    else if (plan != NULL && plan->budget >= 0) plan->used = used;
    unlock(after);
    return done;
}
EXPORT int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
EXPORT int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

EXPORT int mkdirat(int folder, const char *path, mode_t mode) {
    char name[LONGEST];
    int after;
    if (!resolve(folder, path, name)) return syscall(SYS_mkdirat, folder, path, mode);
    if (refused(MKDIR, name, &after)) return -1;
    lock();
    int done = syscall(SYS_mkdirat, folder, path, mode);
    if (done == 0) note(MKDIR, inode_at(name), 0, name, "", NULL, 0);
    unlock(after);
    return done;
}
EXPORT int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Reading */

static int spoils(int fd, int *flip) {
    char name[LONGEST];
    struct stat status;
    int value = 0;
    *flip = 0;
    if (plan == NULL || !ours(fd, name, &status)) return 0;
    enum action action = judge(READ, name, &value);
    *flip = action == FLIP;
    if (action != FAIL) return 0;
    errno = value;
    return 1;
}

static ssize_t flipped(void *data, ssize_t size, int flip) {
    if (flip && size > 0) ((unsigned char *)data)[size / 2] ^= 1;
    return size;
}

EXPORT ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    int flip;
    if (spoils(fd, &flip)) return -1;
    return flipped(data, syscall(SYS_pread64, fd, data, size, offset), flip);
}
ssize_t pread64(int fd, void *data, size_t size, off_t offset) ALIAS(pread);
EXPORT ssize_t __pread_chk(int fd, void *data, size_t size, off_t offset, size_t room_) {
    (void)room_;
    return pread(fd, data, size, offset);
}
ssize_t __pread64_chk(int fd, void *data, size_t size, off_t offset, size_t room_) ALIAS(__pread_chk);

EXPORT ssize_t read(int fd, void *data, size_t size) {
    int flip;
    if (spoils(fd, &flip)) return -1;
    return flipped(data, syscall(SYS_read, fd, data, size), flip);
}
EXPORT ssize_t __read_chk(int fd, void *data, size_t size, size_t room_) {
    (void)room_;
    return read(fd, data, size);
}

EXPORT ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    int flip;
    if (spoils(fd, &flip)) return -1;
    ssize_t size = syscall(SYS_preadv2, fd, parts, count, offset, 0, flags);
    if (count > 0) flipped(parts[0].iov_base, size > (ssize_t)parts[0].iov_len ? (ssize_t)parts[0].iov_len : size, flip);
    return size;
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) ALIAS(preadv2);
EXPORT ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    return preadv2(fd, parts, count, offset, 0);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset) ALIAS(preadv);

/* Free space */

static int with_budget(struct statvfs *status) {
    if (plan != NULL && plan->budget >= 0) status->f_bavail = status->f_bfree = room() / status->f_frsize;
    return 0;
}

static int raw_statvfs(int fd, const char *path, struct statvfs *status) {
    static int (*by_path)(const char *, struct statvfs *);
    static int (*by_fd)(int, struct statvfs *);
    if (by_path == NULL) by_path = (int (*)(const char *, struct statvfs *))dlsym(RTLD_NEXT, "statvfs");
    if (by_fd == NULL) by_fd = (int (*)(int, struct statvfs *))dlsym(RTLD_NEXT, "fstatvfs");
    return path != NULL ? by_path(path, status) : by_fd(fd, status);
}

EXPORT int statvfs(const char *path, struct statvfs *status) {
    char name[LONGEST];
    int failed = raw_statvfs(-1, path, status);
    return failed || !resolve(AT_FDCWD, path, name) ? failed : with_budget(status);
}
EXPORT int statvfs64(const char *path, struct statvfs64 *status) { return statvfs(path, (struct statvfs *)status); }
EXPORT int fstatvfs(int fd, struct statvfs *status) {
    char name[LONGEST];
    int failed = raw_statvfs(fd, NULL, status);
    return failed || root == NULL || !name_of(fd, name) ? failed : with_budget(status);
}
EXPORT int fstatvfs64(int fd, struct statvfs64 *status) { return fstatvfs(fd, (struct statvfs *)status); }
