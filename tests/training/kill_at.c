/* SPDX-License-Identifier: Apache-2.0
 * Preloaded: ends the process with SIGKILL at the n-th event that changes files in one folder.
 * An event is a call that changes files, before it is made, or the middle of a write.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096];
static atomic_long events = 0;
static char wanted[4096];
static long last = -1;
static FILE *journal = NULL;

/* at: the event to die at, -1 for none; part: die at the first event with this in its name, or NULL
 * log: where to write the events' names, or NULL */
void kill_at(const char *inside, long at, const char *part, const char *log) {
  snprintf(wanted, sizeof wanted, "%s", part ? part : "");
  snprintf(folder, sizeof folder, "%s", inside);
  last = at;
  atomic_store(&events, 0);
  journal = log ? fopen(log, "w") : NULL;
}

static int inside(const char *path) {
  size_t n = strlen(folder);
  return n > 0 && path != NULL && strncmp(path, folder, n) == 0 && (path[n] == '/' || !path[n]);
}

static const char *of_descriptor(int fd, char *buffer, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, buffer, size - 1);
  buffer[n < 0 ? 0 : n] = 0;
  return buffer;
}

static int at_inside(int fd, const char *path) {
  char buffer[4096];
  if (path != NULL && path[0] == '/') return inside(path);
  return fd >= 0 && inside(of_descriptor(fd, buffer, sizeof buffer));
}

static int fd_inside(int fd) { return at_inside(fd, NULL); }

static int event(const char *name, const char *what) {
  long number = atomic_fetch_add(&events, 1);
  if (journal != NULL) {
    fprintf(journal, "%ld %s %s\n", number, name, what ? what : "");
    fflush(journal);
  }
  char text[8192];
  snprintf(text, sizeof text, "%s %s", name, what ? what : "");
  return number == last || (wanted[0] && strstr(text, wanted) != NULL);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static void before(int is_inside, const char *name, const char *what) {
  if (is_inside && event(name, what)) die();
}

#define REAL(kind, name, ...) \
  static kind (*real)(__VA_ARGS__) = NULL; \
  if (real == NULL) real = (kind (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  char path[4096];
  if (folder[0] && fd_inside(fd)) {
    of_descriptor(fd, path, sizeof path);
    if (event("write", path)) die();
    if (event("half of write", path)) {
      real(fd, data, size / 2);
      die();
    }
  }
  return real(fd, data, size);
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, #name, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_CREAT | O_TRUNC)) before(inside(path), "open", path); \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int fd, const char *path, int flags, ...) { \
    REAL(int, #name, int, const char *, int, ...); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_CREAT | O_TRUNC)) before(at_inside(fd, path), "open", path); \
    return real(fd, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  before(inside(from), "rename", to);
  return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  REAL(int, "renameat", int, const char *, int, const char *);
  before(at_inside(a, from), "rename", to);
  return real(a, from, b, to);
}

int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  before(inside(path), "unlink", path);
  return real(path);
}

int unlinkat(int fd, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  before(at_inside(fd, path), "unlink", path);
  return real(fd, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, "mkdir", const char *, mode_t);
  before(inside(path), "mkdir", path);
  return real(path, mode);
}

int rmdir(const char *path) {
  REAL(int, "rmdir", const char *);
  before(inside(path), "rmdir", path);
  return real(path);
}

int fsync(int fd) {
  REAL(int, "fsync", int);
  char path[4096];
  before(fd_inside(fd), "fsync", of_descriptor(fd, path, sizeof path));
  return real(fd);
}

#define ALLOCATE(name) \
  int name(int fd, off_t from, off_t size) { \
    REAL(int, #name, int, off_t, off_t); \
    before(fd_inside(fd), "posix_fallocate", NULL); \
    return real(fd, from, size); \
  }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)
