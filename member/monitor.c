//go:build ignore

/* monitor is the parent of a member's init. It writes the member's log, tells
 * whoever is attached what init writes, records how init ended, and then holds
 * the member's root and namespaces until it is killed. docs/ARCHITECTURE.md,
 * "The monitor", has the protocol: descriptors, configuration, status page,
 * messages, exit.json.
 *
 * It is one thread, one loop around ppoll, and allocates nothing. There is one
 * monitor per member, so its resident pages are counted: what is large is in
 * .bss and not touched before it is needed. */
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/uio.h>

#include "../internal/launch/launch.h"
#include "monitor.h"

enum {
	FD_CONFIG = 3,
	FD_STATUS = 4,
	FD_DIR = 5,
	FD_LISTEN = 6,
	FD_STDIN = 7,
	FD_STDOUT = 8,
	FD_STDERR = 9,
	FD_MEMORY = 10,
	FD_INIT = 11,
	FD_MASTER = 12,
	/* The ones above are given; the ones below are the monitor's own. */
	FD_SIGNAL = 13,
	FD_START = 14,
	FD_REPORTS = 15,
	FD_ROOT = 16,
	FD_NS = 17,
	FD_LOG = 25,
	FD_FREE = 32,
};

#define CHILD_MASTER_FD 6 /* launch.MasterFD */
#define LINE_MAX 16384    /* bytes of content in a log line, as in containerd */
#define CLIENTS_MAX 16
#define DRAIN_NS 2000000000ULL
#define REAP_NS 3000000000ULL
#define RETRY_MS 200

/* Frames that are gone when the loop waits do not grow the loop's own. */
#define NOINLINE __attribute__((noinline))

struct timespec64 {
	int64_t sec, nsec;
};

struct message {
	void *name;
	int namelen;
	struct iovec *iov;
	size_t iovlen;
	void *control;
	size_t controllen;
	unsigned flags;
};

struct stream {
	int fd;       /* -1: there is none, or nobody can write to it any more */
	int hungup;   /* a terminal that nobody has open at present */
	int partial;  /* the last log line was tagged P */
	uint32_t len; /* bytes of an unfinished line in buf */
	char *buf;
	const char *name;
};

struct client {
	int fd; /* 0: none */
	int attached, told;
};

/* What is large comes last in memory, so that all the rest is one page. */
#define LARGE __attribute__((section(".bss.large")))

/* Of a path there are the first bytes: as the first variable it is, with this
 * compiler, the last one in memory before what is large. */
static char log_path[LOG_PATH_MAX];
static char lines[2][LINE_MAX] LARGE;
static struct stream streams[2] = {{-1, 0, 0, 0, lines[0], " stdout "}, {-1, 0, 0, 0, lines[1], " stderr "}};
static struct client clients[CLIENTS_MAX];
static struct status *st;
static uint64_t log_max, log_size;
static uint32_t flags, custody, oom_before;
static int init_pid, init_gone, started;
static int reports = -1; /* FD_REPORTS while it is open */
static int reaped;       /* the child that was waited for last */

/* -- Bytes and text -- */

/* The compiler may call it to clear a struct. Where it does not, the linker
 * leaves it out. */
void *memset(void *to, int c, size_t n);

__attribute__((used, section(".text.memset"))) void *memset(void *to, int c, size_t n) {
	for (size_t i = 0; i < n; i++)
		((volatile char *)to)[i] = (char)c;
	return to;
}

/* copy_down copies upwards, so that to may overlap from if it lies below it. */
static void copy_down(char *to, const char *from, size_t n) {
	for (size_t i = 0; i < n; i++)
		to[i] = from[i];
}

static char *put(char *p, const char *s) {
	while (*s)
		*p++ = *s++;
	*p = 0;
	return p;
}

/* behind is the string that follows s in a list of strings. */
static const char *behind(const char *s) {
	while (*s++)
		;
	return s;
}

static char *put_num(char *p, uint64_t n, int digits) {
	char buf[20];
	int i = 0;
	do {
		buf[i++] = (char)('0' + n % 10);
		n /= 10;
	} while (n || i < digits);
	while (i)
		*p++ = buf[--i];
	*p = 0;
	return p;
}

static const char *get_num(const char *p, uint64_t *n) {
	for (*n = 0; *p >= '0' && *p <= '9'; p++)
		*n = *n * 10 + (uint64_t)(*p - '0');
	return p;
}

/* put_time writes RFC 3339 with nine digits of a second, in UTC. The date is
 * that of the proleptic Gregorian calendar, counted in eras of 400 years that
 * begin on 1 March, so that the leap day is the last of its year. */
static char *put_time(char *p, uint64_t ns) {
	uint64_t sec = ns / 1000000000, day = sec / 86400 + 719468;
	sec %= 86400;
	uint64_t era = day / 146097, doe = day % 146097;
	uint64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
	uint64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
	uint64_t mp = (5 * doy + 2) / 153;
	uint64_t month = mp < 10 ? mp + 3 : mp - 9;
	uint32_t part[6] = {
		(uint32_t)(era * 400 + yoe + (month <= 2)), (uint32_t)month, (uint32_t)(doy - (153 * mp + 2) / 5 + 1),
		(uint32_t)(sec / 3600), (uint32_t)(sec / 60 % 60), (uint32_t)(sec % 60),
	};
	for (int i = 0; i < 6; i++) {
		p = put_num(p, part[i], i == 0 ? 4 : 2);
		*p++ = "--T::."[i];
	}
	return put(put_num(p, ns % 1000000000, 9), "Z");
}

static uint64_t now(int clock) {
	struct timespec64 t;
	SYS2(clock_gettime, clock, &t);
	return (uint64_t)t.sec * 1000000000 + (uint64_t)t.nsec;
}

#define REALTIME 0
#define MONOTONIC 1

/* move gives fd the number to and makes it close-on-exec. */
static long move(long fd, int to) {
	if (IS_ERR(fd) || fd == to)
		return fd;
	long r = SYS3(dup3, fd, to, O_CLOEXEC);
	SYS1(close, fd);
	return r;
}

/* proc_open opens /proc/PID/NAME. */
static long proc_open(int pid, const char *name, int mode) {
	char path[64];
	put(put(put_num(put(path, "/proc/"), (uint64_t)pid, 0), "/"), name);
	return SYS4(openat, AT_FDCWD, path, mode | O_CLOEXEC, 0);
}

/* read_small reads the beginning of a file of the kernel's into buf, with a NUL
 * behind it. */
static void read_small(int fd, char *buf, long size) {
	long n = SYS4(pread64, fd, buf, size - 1, 0);
	buf[IS_ERR(n) ? 0 : n] = 0;
}

/* stat_read reads /proc/PID/stat into buf and returns the text behind its second
 * field, the command's name, which may hold anything but a later parenthesis. */
NOINLINE static const char *stat_read(int pid, char *buf, long size) {
	long fd = proc_open(pid, "stat", O_RDONLY);
	if (IS_ERR(fd))
		return "";
	read_small((int)fd, buf, size);
	SYS1(close, fd);
	const char *p = buf;
	for (const char *q = buf; *q; q++)
		if (*q == ')')
			p = q;
	return p;
}

/* stat_field is the number in field n of what stat_read has returned, or 0. */
static uint64_t stat_field(const char *p, int n) {
	for (int field = 2; field < n && *p; p++)
		field += *p == ' ';
	uint64_t v;
	get_num(p, &v);
	return v;
}

#define STAT_MAX 1280 /* 52 numbers of at most 20 digits, and a name of 64 bytes */

static uint64_t start_time(int pid) {
	char buf[STAT_MAX];
	return stat_field(stat_read(pid, buf, sizeof buf), 22);
}

/* oom_kills is the number in the line "oom_kill N", which memory.events and
 * the older memory.oom_control both have. */
NOINLINE static uint32_t oom_kills(void) {
	char buf[512];
	const char *key = "oom_kill ";
	read_small(FD_MEMORY, buf, sizeof buf);
	for (const char *p = buf; *p;) {
		int i = 0;
		while (key[i] && p[i] == key[i])
			i++;
		if (!key[i]) {
			uint64_t n;
			get_num(p + i, &n);
			return (uint32_t)n;
		}
		while (*p && *p++ != '\n')
			;
	}
	return 0;
}

/* -- Clients -- */

static void client_close(struct client *c) {
	SYS1(close, c->fd);
	c->fd = 0;
}

/* client_send sends one message, and drops a client that has no room for it. */
static void client_send(struct client *c, char kind, const void *p, size_t n) {
	struct iovec iov[2] = {{&kind, 1}, {(void *)p, n}};
	struct message m = {0, 0, iov, 2, 0, 0, 0};
	long r = SYS3(sendmsg, c->fd, &m, 0x4040 /* MSG_DONTWAIT|MSG_NOSIGNAL */);
	if (!IS_ERR(r))
		return;
	if (r == -EAGAIN)
		st->clients_dropped++;
	client_close(c);
}

static void client_answer(struct client *c, long r) {
	uint32_t err = (uint32_t)-r;
	if (IS_ERR(r))
		client_send(c, 'e', &err, sizeof err);
	else
		client_send(c, 'k', 0, 0);
}

static void broadcast(char kind, const void *p, size_t n) {
	for (struct client *c = clients; c < clients + CLIENTS_MAX; c++)
		if (c->fd && c->attached)
			client_send(c, kind, p, n);
	/* The daemon comes last: when it learns of an exit it may end this process,
	 * and with it what is still unsaid to others. */
	for (struct client *c = clients; c < clients + CLIENTS_MAX && (kind == 'p' || kind == 'c'); c++)
		if (c->fd && c->told && !c->attached)
			client_send(c, kind, p, n);
}

/* set_phase makes all that was written to the page before visible with it. */
static void set_phase(uint32_t phase) {
	__atomic_store_n(&st->phase, phase, __ATOMIC_RELEASE);
	broadcast('p', &phase, sizeof phase);
}

/* init_start lets a created init execute its command. */
static long init_start(void) {
	uint64_t one = 1;
	long n = SYS3(write, FD_START, &one, sizeof one);
	started = n == sizeof one;
	return n;
}

static void client_accept(void) {
	long fd = SYS4(accept4, FD_LISTEN, 0, 0, O_CLOEXEC);
	if (IS_ERR(fd))
		return;
	/* Out of the way of the numbers that are promised. */
	long high = SYS3(fcntl, fd, F_DUPFD_CLOEXEC, FD_FREE);
	SYS1(close, fd);
	for (struct client *c = clients; !IS_ERR(high) && c < clients + CLIENTS_MAX; c++) {
		if (!c->fd) {
			*c = (struct client){(int)high, 0, 0};
			return;
		}
	}
	if (!IS_ERR(high))
		SYS1(close, high);
}

static long log_open(void);

/* client_begin tells a client where in the output it begins, and where in the
 * log: from there on it finds what comes to it too. */
NOINLINE static void client_begin(struct client *c) {
	uint64_t begin[5] = {
		st->output_bytes[0], st->output_bytes[1], streams[0].len, streams[1].len,
		(uint64_t)SYS3(lseek, FD_LOG, 0, 2 /* SEEK_END */),
	};
	client_send(c, 'o', begin, sizeof begin);
}

static void client_read(struct client *c) {
	char buf[2] = {0, 0};
	/* With MSG_TRUNC the length is the message's, also of a longer one. */
	long n = SYS6(recvfrom, c->fd, buf, sizeof buf, 0x60 /* MSG_DONTWAIT|MSG_TRUNC */, 0, 0);
	if (n == -EAGAIN || n == -EINTR)
		return;
	if (n <= 0) {
		client_close(c);
		return;
	}
	uint32_t phase = st->phase;
	switch (n == 1 ? buf[0] : 0) {
	case 'a':
		c->attached = 1;
		client_begin(c);
		__attribute__((fallthrough));
	case 'w':
		c->told = 1;
		if (c->fd && phase != PHASE_NONE) /* who started the monitor is here before it is told anything */
			client_send(c, 'p', &phase, sizeof phase);
		break;
	case 's':
		if (phase != PHASE_CREATED || started) {
			client_answer(c, phase == PHASE_CREATED || phase == PHASE_RUNNING ? -EALREADY : -ESRCH);
			break;
		}
		client_answer(c, init_start());
		break;
	case 'c':
		/* The flag first: whoever opens the FIFO looks at it afterwards. */
		st->flags |= STATUS_STDIN_CLOSED;
		SYS1(close, FD_STDIN);
		client_answer(c, 0);
		broadcast('c', 0, 0);
		break;
	case 'r':
		client_answer(c, log_open());
		break;
	default:
		client_answer(c, -EINVAL);
	}
}

/* -- Output -- */

/* log_open opens the log, again if it is open. If it cannot, the old one stays.
 * No link is followed: the member may have a volume where its log is. */
static long log_open(void) {
	uint64_t how[3] = {O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0640, 4 /* RESOLVE_NO_SYMLINKS */};
	long fd = SYS4(openat2, AT_FDCWD, log_path, how, sizeof how);
	fd = move(fd, FD_LOG);
	if (IS_ERR(fd))
		return fd;
	long size = SYS3(lseek, fd, 0, 2 /* SEEK_END */);
	log_size = IS_ERR(size) ? 0 : (uint64_t)size;
	return 0;
}

/* log_line writes one line with one call, so that no reader sees half of it
 * and no other writer gets between. A line that does not fit the file system
 * is taken back, counted and forgotten: init must not wait for a disk. */
static void log_line(struct stream *s, const char *tag, const char *p, size_t n) {
	char head[64];
	char *end = put(put(put_time(head, now(REALTIME)), s->name), tag);
	struct iovec iov[3] = {{head, (size_t)(end - head)}, {(void *)p, n}, {"\n", 1}};
	uint64_t total = (uint64_t)(end - head) + n + 1;
	s->partial = *tag == 'P';
	if (log_max && log_size + total > log_max) {
		st->log_errors++;
		return;
	}
	long r = SYS3(writev, FD_LOG, iov, 3);
	if (!IS_ERR(r))
		log_size += (uint64_t)r;
	if (r == (long)total)
		return;
	st->log_errors++;
	if (r > 0) {
		long size = SYS3(lseek, FD_LOG, 0, 2);
		if (size >= r && !IS_ERR(SYS2(ftruncate, FD_LOG, size - r)))
			log_size -= (uint64_t)r;
	}
}

/* stream_read reads once, tells the clients, and logs what lines there are.
 * It returns whether there was anything. */
static int stream_read(struct stream *s) {
	if (s->fd < 0)
		return 0;
	char *at = s->buf + s->len;
	long n = SYS3(read, s->fd, at, LINE_MAX - s->len);
	if (n == -EAGAIN || n == -EINTR)
		return 0;
	if (n <= 0) {
		/* Nobody has the other end. A terminal can be opened again by name as
		 * long as init lives; a pipe cannot by anyone but the host. */
		s->hungup = n == -EIO && !init_gone;
		if (!s->hungup)
			s->fd = -1;
		return 0;
	}
	s->hungup = 0;
	st->output_bytes[s - streams] += (uint64_t)n;
	broadcast((char)('1' + (s - streams)), at, (size_t)n);
	char *line = s->buf, *end = at + n;
	for (char *p = at; p < end; p++) {
		if (*p == '\n') {
			log_line(s, "F ", line, (size_t)(p - line));
			line = p + 1;
		}
	}
	s->len = (uint32_t)(end - line);
	if (s->len == LINE_MAX) {
		log_line(s, "P ", line, s->len);
		s->len = 0;
	} else if (line != s->buf) {
		copy_down(s->buf, line, s->len);
	}
	return 1;
}

/* drain takes what is in the pipes when init is gone. A child that it left
 * behind may hold them open for ever and write without end. */
static void drain(void) {
	uint64_t end = now(MONOTONIC) + DRAIN_NS;
	for (int i = 0; i < 2; i++) {
		struct stream *s = &streams[i];
		while (stream_read(s) && now(MONOTONIC) < end)
			;
		/* The last line is whole for its readers, as in containerd: they keep
		 * a P back until its F comes. */
		if (s->len || s->partial)
			log_line(s, "F ", s->buf, s->len);
		s->len = 0;
	}
}

/* -- The end of init -- */

static int exit_exists(void) { return !IS_ERR(SYS4(faccessat, FD_DIR, "exit.json", 0, 0)); }

/* exit_write makes exit.json durable. It does not replace one: the daemon may
 * have been init's parent and know more. If it cannot be written, the status
 * page is all that says how init ended. */
static void exit_write(int status, const struct rusage *ru, const char *why) {
	char buf[512], *p = buf;
	const char *key = "waitStatus\0oomKills\0finishedAtNs\0userMicros\0systemMicros\0maxRssKiB";
	uint64_t values[6] = {
		(uint32_t)status, st->oom_kills, st->finished_ns,
		(uint64_t)(ru->ru_utime.tv_sec * 1000000 + ru->ru_utime.tv_usec),
		(uint64_t)(ru->ru_stime.tv_sec * 1000000 + ru->ru_stime.tv_usec), (uint64_t)ru->ru_maxrss,
	};
	p = put(put(p, "{\"version\":1,\"known\":"), *why ? "false" : "true");
	for (int i = 0; i < 6; i++, key = behind(key))
		p = put_num(put(put(put(p, ",\""), key), "\":"), values[i], 0);
	p = put(put(put(p, ",\"why\":\""), why), "\"}\n");
	const char *tmp = "exit.json.tmp";
	long fd = SYS4(openat, FD_DIR, tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (IS_ERR(fd))
		return;
	long want = p - buf;
	int ok = SYS3(write, fd, buf, want) == want && SYS1(fsync, fd) == 0;
	SYS1(close, fd);
	if (!ok || IS_ERR(SYS5(renameat2, FD_DIR, tmp, FD_DIR, "exit.json", 1 /* RENAME_NOREPLACE */))) {
		SYS3(unlinkat, FD_DIR, tmp, 0);
		return;
	}
	fd = SYS4(openat, FD_DIR, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
	if (!IS_ERR(fd)) {
		SYS1(fsync, fd);
		SYS1(close, fd);
	}
}

/* init_ended does all that follows init's end, in the order of the protocol. */
NOINLINE static void init_ended(int status, const struct rusage *ru, const char *why) {
	init_gone = 1;
	st->finished_ns = now(REALTIME);
	st->oom_kills = oom_kills() - oom_before;
	st->wait_status = status;
	if (*why)
		st->flags |= STATUS_UNKNOWN;
	drain();
	exit_write(status, ru, why);
	/* There is nothing to keep if init had ended before it was adopted. */
	int keep = st->flags & STATUS_CUSTODY &&
		(custody == CUSTODY_ALWAYS || (custody == CUSTODY_FAILURE && (*why || status != 0)));
	if (!keep)
		st->flags &= ~(uint32_t)STATUS_CUSTODY;
	set_phase(PHASE_EXITED);
	if (!keep)
		sys_exit(0);
}

static _Noreturn void fail(int32_t op, long err) {
	st->fail_op = op;
	st->fail_errno = (int32_t)err;
	if (init_pid > 0 && init_pid != reaped && !(flags & FLAG_ADOPT)) {
		/* Its own child, which cannot have been reaped. */
		SYS2(kill, init_pid, 9);
		SYS4(wait4, init_pid, 0, 0, 0);
	}
	st->oom_kills = oom_kills() - oom_before;
	st->finished_ns = now(REALTIME);
	set_phase(PHASE_FAILED);
	sys_exit(1);
}

/* zombie_status is the wait status of init, or -1 if it is no zombie. Field 52 is
 * 0 for whoever may not trace the process, which the same question about a
 * namespace tells (proc_pid_stat(5)). Before Linux 5.17, unless it was given the
 * correction too ("exit: Use the correct exit_code in /proc/<pid>/stat"), it is the
 * status of the main thread, which is another one if that has ended before the
 * others did; nothing tells that it has. */
NOINLINE static int zombie_status(void) {
	char buf[STAT_MAX];
	const char *p = stat_read(init_pid, buf, sizeof buf);
	if (!*p || p[2] != 'Z' || stat_field(p, 22) != st->init_start)
		return -1;
	long ns = proc_open(init_pid, "ns/user", O_RDONLY);
	if (ns == -EACCES)
		return -1;
	SYS1(close, ns);
	return (int)stat_field(p, 52);
}

/* adopted_ended is called when the init of an adopted member has ended. Its
 * parent reaps it: then either the kernel tells a pidfd's owner how it ended
 * (since Linux 6.15), or the parent was the daemon, which writes exit.json. A
 * parent that reaps nobody, or does so late, leaves a zombie that tells it. */
static void adopted_ended(void) {
	struct {
		uint64_t mask, cgroup;
		uint32_t ids[11];
		int32_t exit_code;
	} info;
	struct rusage ru = {0};
	uint64_t end = now(MONOTONIC) + REAP_NS;
	int status = -1;
	do {
		info.mask = 8; /* PIDFD_INFO_EXIT */
		long r = SYS3(ioctl, FD_INIT, 0xc040ff0b /* PIDFD_GET_INFO */, &info);
		if (r == 0 && info.mask & 8) {
			init_ended(info.exit_code, &ru, "");
			return;
		}
		if (status < 0)
			status = zombie_status();
		/* The info is there from the moment that POLLHUP is; on older kernels
		 * this waits for the time, or for exit.json: the daemon knows more
		 * than the status. */
		struct pollfd p = {FD_INIT, 0, 0};
		struct timespec64 t = {0, 50000000};
		SYS5(ppoll, &p, 1, &t, 0, 8);
	} while (status < 0 && !exit_exists() && now(MONOTONIC) < end);
	init_ended(status < 0 ? 0 : status, &ru,
		status < 0 ? "monitor was killed and the kernel does not tell the exit status of another's child (PIDFD_GET_INFO)" : "");
}

/* -- The beginning of init -- */

/* custody_open opens what custody consists of. It returns 0 or an errno,
 * negative. A kind of namespace that the kernel lacks is absent. */
static long custody_open(void) {
	const char *kind = "ns/net\0ns/ipc\0ns/uts\0ns/pid\0ns/mnt\0ns/user\0ns/cgroup\0ns/time";
	long r = move(proc_open(init_pid, "root", O_PATH | O_DIRECTORY), FD_ROOT);
	if (IS_ERR(r))
		return r;
	for (int i = 0; i < 8; i++, kind = behind(kind)) {
		r = move(proc_open(init_pid, kind, O_RDONLY), FD_NS + i);
		if (IS_ERR(r) && r != -ENOENT)
			return r;
	}
	st->flags |= STATUS_CUSTODY;
	return 0;
}

static void stream_open(void) {
	streams[0].fd = flags & FLAG_TTY ? FD_MASTER : FD_STDOUT;
	streams[1].fd = flags & FLAG_TTY ? -1 : FD_STDERR;
	if (flags & FLAG_TTY) /* shared with the daemon and attached clients, who want it so too */
		SYS3(fcntl, FD_MASTER, F_SETFL, O_RDWR | O_NONBLOCK);
}

/* init_is publishes who init is, early: whoever ends a creation half way kills
 * by it. */
static void init_is(int pid) {
	init_pid = pid;
	st->init_start = start_time(pid);
	__atomic_store_n(&st->init_pid, pid, __ATOMIC_RELEASE);
}

static void init_created(void) {
	if (flags & FLAG_TTY) {
		long pidfd = SYS2(pidfd_open, init_pid, 0);
		long r = IS_ERR(pidfd) ? pidfd : move(SYS3(pidfd_getfd, pidfd, CHILD_MASTER_FD, 0), FD_MASTER);
		SYS1(close, pidfd);
		if (IS_ERR(r))
			fail(FAIL_CUSTODY, -r);
	}
	long r = custody_open();
	if (IS_ERR(r))
		fail(FAIL_CUSTODY, -r);
	stream_open();
	st->created_ns = now(REALTIME);
	if (!(flags & FLAG_RUN)) {
		set_phase(PHASE_CREATED);
		return;
	}
	/* Nobody waits for this phase. */
	__atomic_store_n(&st->phase, PHASE_CREATED, __ATOMIC_RELEASE);
	init_start();
}

/* reports_read takes what the child has said so far. The end of the pipe means
 * that the execve has succeeded, unless it has failed or the child is dead. */
static void reports_read(void) {
	struct report r;
	long n;
	if (reports < 0)
		return;
	while ((n = SYS3(read, reports, &r, sizeof r)) == sizeof r) {
		if (r.kind == REPORT_PID) {
			init_is(r.value);
		} else if (r.kind == REPORT_CREATED && st->phase == PHASE_NONE) {
			init_created();
		} else if (r.kind == REPORT_FAILED && st->phase == PHASE_NONE) {
			fail((int32_t)r.op, r.value);
		} else if (r.kind == REPORT_FAILED) {
			st->fail_op = (int32_t)r.op;
			st->fail_errno = r.value;
			st->flags |= STATUS_EXEC_FAILED;
		}
	}
	if (n == -EAGAIN || n == -EINTR)
		return;
	SYS1(close, reports);
	reports = -1;
	/* A monitor that was killed may have started it. */
	if ((started || flags & FLAG_ADOPT) && st->phase == PHASE_CREATED && !(st->flags & STATUS_EXEC_FAILED)) {
		st->started_ns = now(REALTIME);
		set_phase(PHASE_RUNNING);
	}
}

/* reap waits for every child that has ended: init, launchers that have forked,
 * and whatever init's descendants left behind. */
NOINLINE static void reap(void) {
	struct rusage ru;
	int status;
	long pid;
	while ((pid = SYS4(wait4, -1, &status, 1 /* WNOHANG */, &ru)) > 0) {
		if (pid != init_pid || init_gone || flags & FLAG_ADOPT)
			continue;
		/* What it said last may still be in the pipe: that another is init
		 * now, or why it ended. */
		reaped = (int)pid;
		reports_read();
		if (pid != init_pid)
			continue;
		if (st->phase == PHASE_NONE) {
			st->wait_status = status;
			fail(FAIL_KILLED, 0);
		}
		init_ended(status, &ru, "");
	}
}

/* run_child is init before its execve: it has its own copy of the monitor's memory. */
static _Noreturn void run_child(struct program *p, uint32_t first, int w) {
	uint64_t none = 0;
	SYS4(rt_sigprocmask, 2 /* SIG_SETMASK */, &none, 0, 8);
	SYS3(dup3, FD_START, START_FD, O_CLOEXEC);
	SYS3(dup3, w, STATUS_FD, O_CLOEXEC);
	SYS3(close_range, STATUS_FD + 2, FD_FREE - 1, 0);
	/* The program's files follow one another; what is behind them was inherited
	 * by mistake. */
	int fd = FD_FREE;
	while (SYS3(fcntl, fd, F_SETFD, 1 /* FD_CLOEXEC */) == 0)
		fd++;
	SYS3(close_range, fd, ~0u, 0);
	prog_run(p, first);
}

static void create(struct program *p) {
	int fds[2];
	long r = SYS2(pipe2, fds, O_CLOEXEC | O_NONBLOCK);
	if (IS_ERR(r))
		fail(FAIL_SETUP, -r);
	/* The writing end must block for the child, and be out of the way of the
	 * numbers that it is given. */
	SYS3(fcntl, fds[1], F_SETFL, O_WRONLY);
	long w = SYS3(fcntl, fds[1], F_DUPFD_CLOEXEC, FD_LOG + 1);
	SYS1(close, fds[1]);
	reports = (int)move(fds[0], FD_REPORTS);
	r = move(SYS2(eventfd2, 0, O_CLOEXEC), FD_START);
	if (IS_ERR(r) || IS_ERR(w) || w >= FD_FREE)
		fail(FAIL_SETUP, IS_ERR(r) ? -r : EMFILE);
	/* A fork at the beginning of the program is this one. */
	struct prog_op *op = p->ops;
	uint32_t first = op->nr == NR_FORK;
	r = prog_clone(first ? op->arg[0] : 0, 17 /* SIGCHLD */, first ? (long)op->arg[1] : -1);
	if (r == 0)
		run_child(p, first, (int)w);
	if (IS_ERR(r))
		fail(first ? 0 : FAIL_SETUP, -r);
	init_is((int)r);
	SYS1(close, w);
	SYS3(close_range, FD_FREE, ~0u, 0);
}

/* adopt takes over from a monitor that was killed. init may have ended since;
 * then there is no custody to be had any more. If it has not been started, the
 * two ends that the old monitor had are got back from it. */
static void adopt(uint64_t init_start) {
	st->flags &= ~(uint32_t)STATUS_CUSTODY;
	if (start_time(init_pid) == init_start)
		custody_open();
	stream_open();
	if (st->phase == PHASE_CREATED) {
		long start = SYS3(pidfd_getfd, FD_INIT, START_FD, 0);
		long status = proc_open(init_pid, "fd/3", O_RDONLY | O_NONBLOCK);
		if (IS_ERR(start) || IS_ERR(status)) { /* both are closed by the execve */
			SYS1(close, start);
			SYS1(close, status);
			st->started_ns = now(REALTIME);
			set_phase(PHASE_RUNNING);
		} else {
			move(start, FD_START);
			reports = (int)move(status, FD_REPORTS);
		}
	}
}

/* -- Set-up and the loop -- */

static void setup(void) {
	uint64_t all = ~0ULL, chld = 1ULL << (17 - 1);
	SYS4(rt_sigprocmask, 0 /* SIG_BLOCK */, &all, 0, 8);
	SYS5(prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
	SYS5(prctl, PR_SET_NAME, "sandboxd-monitor", 0, 0, 0); /* else it is called by a descriptor's number */
	SYS5(prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	SYS1(umask, 022);
	SYS1(chdir, "/");
	long r = SYS6(mmap, 0, STATUS_SIZE, 3 /* READ|WRITE */, 1 /* MAP_SHARED */, FD_STATUS, 0);
	if (IS_ERR(r))
		sys_exit(2);
	st = (struct status *)r;
	st->magic = STATUS_MAGIC;
	st->version = STATUS_VERSION;
	st->monitor_pid = (int32_t)SYS0(getpid);
	r = move(SYS4(signalfd4, -1, &chld, 8, O_CLOEXEC | O_NONBLOCK), FD_SIGNAL);
	if (IS_ERR(r))
		fail(FAIL_SETUP, -r);
}

NOINLINE static void begin(void) {
	setup();
	long len = SYS3(lseek, FD_CONFIG, 0, 2 /* SEEK_END */);
	long r = IS_ERR(len) ? len : SYS6(mmap, 0, len, 3, 2 /* MAP_PRIVATE */, FD_CONFIG, 0);
	if (IS_ERR(r))
		fail(FAIL_CONFIG, -r);
	SYS1(close, FD_CONFIG);
	struct config *c = (struct config *)r;
	struct program p = {0};
	if (config_check(c, (uint64_t)len) ||
	    (!(c->flags & FLAG_ADOPT) && prog_open(&p, (char *)c + c->program_offset, c->program_len)))
		fail(FAIL_CONFIG, EINVAL);
	flags = c->flags;
	custody = c->custody;
	log_max = c->log_max_bytes;
	copy_down(log_path, c->log_path, c->log_path_len);
	uint64_t init_start = c->init_start;
	if (flags & FLAG_ADOPT)
		init_pid = (int)c->init_pid;
	long err = log_open();
	if (IS_ERR(err) && !(flags & FLAG_ADOPT))
		fail(FAIL_LOG, -err);
	if (!(flags & FLAG_ADOPT)) {
		oom_before = oom_kills();
		create(&p);
	}
	SYS2(munmap, r, len);
	if (flags & FLAG_ADOPT)
		adopt(init_start);
}

/* poll_fd is the descriptor to wait for a stream with: a terminal that is hung
 * up would be ready for ever. */
static int poll_fd(const struct stream *s) { return s->hungup ? -1 : s->fd; }

__attribute__((used)) _Noreturn static void monitor_main(void) {
	enum { SIGNAL, LISTEN, REPORTS, OUT, ERR, INIT, CLIENTS };
	begin();
	for (;;) {
		struct pollfd p[CLIENTS + CLIENTS_MAX];
		struct timespec64 retry = {0, RETRY_MS * 1000000};
		int adopted = flags & FLAG_ADOPT && !init_gone;
		int hungup = streams[0].hungup;
		p[SIGNAL] = (struct pollfd){FD_SIGNAL, POLLIN, 0};
		p[LISTEN] = (struct pollfd){FD_LISTEN, POLLIN, 0};
		p[REPORTS] = (struct pollfd){reports, POLLIN, 0};
		p[OUT] = (struct pollfd){poll_fd(&streams[0]), POLLIN, 0};
		p[ERR] = (struct pollfd){poll_fd(&streams[1]), POLLIN, 0};
		p[INIT] = (struct pollfd){adopted ? FD_INIT : -1, POLLIN, 0};
		for (int i = 0; i < CLIENTS_MAX; i++)
			p[CLIENTS + i] = (struct pollfd){clients[i].fd ? clients[i].fd : -1, POLLIN, 0};
		long n = SYS5(ppoll, p, CLIENTS + CLIENTS_MAX, hungup ? &retry : 0, 0, 8);
		if (IS_ERR(n))
			continue;
		/* Clients first: whoever is attached before init writes sees it. The
		 * slot of one that was dropped meanwhile is free, not another's. */
		for (int i = 0; i < CLIENTS_MAX; i++)
			if (p[CLIENTS + i].revents && clients[i].fd == p[CLIENTS + i].fd)
				client_read(&clients[i]);
		if (p[LISTEN].revents)
			client_accept();
		if (p[REPORTS].revents)
			reports_read();
		if (p[OUT].revents || hungup)
			stream_read(&streams[0]);
		if (p[ERR].revents)
			stream_read(&streams[1]);
		if (p[SIGNAL].revents) {
			char info[128]; /* one struct signalfd_siginfo; the signal does not queue */
			SYS3(read, FD_SIGNAL, info, sizeof info);
			reap();
		}
		if (p[INIT].revents)
			adopted_ended();
	}
}

ENTRY(monitor_main);
