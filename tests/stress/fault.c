// Makes the n-th file operation of a process fail, come short, or be its last.
//
// Loaded with LD_PRELOAD, it stands before libc's functions that open, read, write, sync, rename, make, remove and lock
// files. Nothing happens until fault_arm() says which operations count: those of some kinds on paths that contain a
// given text. faults.py builds and calls it.
//
// Kinds   o open for writing      i open for reading    w write      r read, mmap     s fsync
//         c close of a file that was open for writing   n rename     u unlink, rmdir  m mkdir
//         t truncate, allocate    l link, symlink       k flock      d opendir
//
// What libc does inside itself (a FILE's buffer, for one) and system calls made without libc are not seen.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { ONCE = 0, EVER_AFTER = 1, SHORT = 2, KILL = 3, TRACE = 4 };

#define PATH_BYTES 4352  // PATH_MAX, and room for a name behind a folder

static struct {
  char kinds[32];
  char under[PATH_BYTES];
  long nth;
  int error, mode, report;
  long seen;
} armed = {.report = -1};

// The function of this name that libc would have given.
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// Counts operations of `kinds` on paths that contain `under` from now on. The n-th of them, from 1, fails with `error`
// (ONCE), and so do all that follow (EVER_AFTER); it writes half of its bytes (SHORT; what is no write is left alone);
// or the process is killed at it (KILL). TRACE lets all pass. `report` is a file descriptor, or -1: it gets a line
// "kind path" for every operation that was hit, or traced.
void fault_arm(const char *kinds, const char *under, long nth, int error, int mode, int report) {
  snprintf(armed.under, sizeof armed.under, "%s", under);
  armed.nth = nth, armed.error = error, armed.mode = mode, armed.report = report;
  __atomic_store_n(&armed.seen, 0, __ATOMIC_SEQ_CST);
  snprintf(armed.kinds, sizeof armed.kinds, "%s", kinds);
}

long fault_seen(void) { return __atomic_load_n(&armed.seen, __ATOMIC_SEQ_CST); }

static void report(char kind, const char *path) {
  char line[PATH_BYTES + 8];
  int length = snprintf(line, sizeof line, "%c %s\n", kind, path);
  if (armed.report >= 0 && length > 0) {
    ssize_t written = NEXT(write)(armed.report, line, length);
    (void)written;
  }
}

// Whether this operation is to fail, or to come short; does not return where the process is to die at it.
static int hit(char kind, const char *path) {
  if (!armed.kinds[0] || !path || !strchr(armed.kinds, kind) || !strstr(path, armed.under)) return 0;
  long number = __atomic_add_fetch(&armed.seen, 1, __ATOMIC_SEQ_CST);
  if (armed.mode == TRACE) {
    report(kind, path);
    return 0;
  }
  if (number < armed.nth || (number > armed.nth && armed.mode != EVER_AFTER)) return 0;
  if (armed.mode == SHORT && kind != 'w') return 0;
  report(kind, path);
  if (armed.mode == KILL) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = armed.error;
  return 1;
}

static int counts(char kind) { return armed.kinds[0] && strchr(armed.kinds, kind); }

// The path of an open file, in a buffer of the thread; NULL where it has none.
static const char *path_of(int fd) {
  static __thread char path[PATH_BYTES];
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return NULL;
  path[length] = 0;
  return path;
}

// `name` as seen from the folder `dir`, in a buffer of the thread.
static const char *joined(int dir, const char *name) {
  static __thread char path[2 * PATH_BYTES];
  if (!armed.kinds[0] || !name || name[0] == '/' || dir == AT_FDCWD) return name;
  const char *folder = path_of(dir);
  if (!folder) return name;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static int hit_fd(char kind, int fd) { return counts(kind) && hit(kind, path_of(fd)); }

// ---- reading and writing

// A write of `count` bytes that comes short, or fails; `whole` is the real call, `part` the one of half the bytes.
#define WRITTEN(fd, whole, part)          \
  if (hit_fd('w', fd)) {                  \
    if (armed.mode == SHORT) return part; \
    return -1;                            \
  }                                       \
  return whole

static size_t half(size_t count) { return count > 1 ? count / 2 : count; }

ssize_t write(int fd, const void *data, size_t count) {
  WRITTEN(fd, NEXT(write)(fd, data, count), NEXT(write)(fd, data, half(count)));
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
  WRITTEN(fd, NEXT(pwrite)(fd, data, count, at), NEXT(pwrite)(fd, data, half(count), at));
}
ssize_t pwrite64(int fd, const void *data, size_t count, off_t at) {
  WRITTEN(fd, NEXT(pwrite64)(fd, data, count, at), NEXT(pwrite64)(fd, data, half(count), at));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  WRITTEN(fd, NEXT(writev)(fd, parts, count), NEXT(write)(fd, parts[0].iov_base, half(parts[0].iov_len)));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  WRITTEN(fd, NEXT(pwritev)(fd, parts, count, at), NEXT(pwrite)(fd, parts[0].iov_base, half(parts[0].iov_len), at));
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) {
  WRITTEN(fd, NEXT(pwritev64)(fd, parts, count, at), NEXT(pwrite)(fd, parts[0].iov_base, half(parts[0].iov_len), at));
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  WRITTEN(fd, NEXT(pwritev64v2)(fd, parts, count, at, flags),
          NEXT(pwrite)(fd, parts[0].iov_base, half(parts[0].iov_len), at));
}
ssize_t sendfile(int to, int from, off_t *at, size_t count) {
  WRITTEN(to, NEXT(sendfile)(to, from, at, count), NEXT(sendfile)(to, from, at, half(count)));
}
ssize_t sendfile64(int to, int from, off_t *at, size_t count) {
  WRITTEN(to, NEXT(sendfile64)(to, from, at, count), NEXT(sendfile64)(to, from, at, half(count)));
}
ssize_t copy_file_range(int from, off_t *from_at, int to, off_t *to_at, size_t count, unsigned flags) {
  WRITTEN(to, NEXT(copy_file_range)(from, from_at, to, to_at, count, flags),
          NEXT(copy_file_range)(from, from_at, to, to_at, half(count), flags));
}
ssize_t read(int fd, void *data, size_t count) { return hit_fd('r', fd) ? -1 : NEXT(read)(fd, data, count); }
ssize_t readv(int fd, const struct iovec *parts, int count) {
  return hit_fd('r', fd) ? -1 : NEXT(readv)(fd, parts, count);
}
ssize_t pread64(int fd, void *data, size_t count, off_t at) {
  return hit_fd('r', fd) ? -1 : NEXT(pread64)(fd, data, count, at);
}
void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
  if (fd >= 0 && hit_fd('r', fd)) return MAP_FAILED;
  return NEXT(mmap)(at, length, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
  if (fd >= 0 && hit_fd('r', fd)) return MAP_FAILED;
  return NEXT(mmap64)(at, length, protection, flags, fd, offset);
}
int fsync(int fd) { return hit_fd('s', fd) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return hit_fd('s', fd) ? -1 : NEXT(fdatasync)(fd); }

// ---- opening and closing

static int opens_to_write(int flags) { return (flags & O_ACCMODE) != O_RDONLY; }

static int refused(const char *path, int flags) {
  if (opens_to_write(flags)) return hit('o', path);
  return !(flags & O_DIRECTORY) && hit('i', path);
}

// The mode that an open with these flags was given.
#define MODE(flags)                      \
  mode_t mode = 0;                       \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list rest;                        \
    va_start(rest, flags);               \
    mode = va_arg(rest, mode_t);         \
    va_end(rest);                        \
  }

int open(const char *path, int flags, ...) {
  MODE(flags);
  return refused(path, flags) ? -1 : NEXT(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags);
  return refused(path, flags) ? -1 : NEXT(open64)(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
  MODE(flags);
  return refused(joined(dir, path), flags) ? -1 : NEXT(openat)(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
  MODE(flags);
  return refused(joined(dir, path), flags) ? -1 : NEXT(openat64)(dir, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
  return hit(strpbrk(mode, "wa+") ? 'o' : 'i', path) ? NULL : NEXT(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  return hit(strpbrk(mode, "wa+") ? 'o' : 'i', path) ? NULL : NEXT(fopen64)(path, mode);
}
DIR *opendir(const char *path) { return hit('d', path) ? NULL : NEXT(opendir)(path); }
DIR *fdopendir(int fd) { return hit_fd('d', fd) ? NULL : NEXT(fdopendir)(fd); }

int close(int fd) {
  if (!counts('c') || !opens_to_write(fcntl(fd, F_GETFL)) || !hit_fd('c', fd)) return NEXT(close)(fd);
  NEXT(close)(fd);  // Linux gives the descriptor back whatever it says
  errno = armed.error;
  return -1;
}

// ---- names

int rename(const char *from, const char *to) { return hit('n', from) ? -1 : NEXT(rename)(from, to); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
  return hit('n', joined(from_dir, from)) ? -1 : NEXT(renameat)(from_dir, from, to_dir, to);
}
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
  return hit('n', joined(from_dir, from)) ? -1 : NEXT(renameat2)(from_dir, from, to_dir, to, flags);
}
int unlink(const char *path) { return hit('u', path) ? -1 : NEXT(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
  return hit('u', joined(dir, path)) ? -1 : NEXT(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) { return hit('u', path) ? -1 : NEXT(rmdir)(path); }
int remove(const char *path) { return hit('u', path) ? -1 : NEXT(remove)(path); }
int mkdir(const char *path, mode_t mode) { return hit('m', path) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) {
  return hit('m', joined(dir, path)) ? -1 : NEXT(mkdirat)(dir, path, mode);
}
int link(const char *from, const char *to) { return hit('l', to) ? -1 : NEXT(link)(from, to); }
int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
  return hit('l', joined(to_dir, to)) ? -1 : NEXT(linkat)(from_dir, from, to_dir, to, flags);
}
int symlink(const char *target, const char *path) { return hit('l', path) ? -1 : NEXT(symlink)(target, path); }
int symlinkat(const char *target, int dir, const char *path) {
  return hit('l', joined(dir, path)) ? -1 : NEXT(symlinkat)(target, dir, path);
}

// ---- sizes and locks

int ftruncate(int fd, off_t size) { return hit_fd('t', fd) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off_t size) { return hit_fd('t', fd) ? -1 : NEXT(ftruncate64)(fd, size); }
int truncate64(const char *path, off_t size) { return hit('t', path) ? -1 : NEXT(truncate64)(path, size); }
int fallocate64(int fd, int mode, off_t at, off_t count) {
  return hit_fd('t', fd) ? -1 : NEXT(fallocate64)(fd, mode, at, count);
}
int posix_fallocate64(int fd, off_t at, off_t count) {  // returns its error
  return hit_fd('t', fd) ? armed.error : NEXT(posix_fallocate64)(fd, at, count);
}
int flock(int fd, int operation) { return !(operation & LOCK_UN) && hit_fd('k', fd) ? -1 : NEXT(flock)(fd, operation); }
