/* Binds by a process of its own, by every way the kernel has: oddbind WAY WHAT
 *
 * Prints the error number, the port that the socket then has and the socket's cookie. Exit code 77: this kernel has no
 * such way or socket, standard error says which call refused. Linked statically: it runs where there is no compiler.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LACKING 77
#define OP_BIND 56 /* IORING_OP_BIND, Linux 6.11 */
#define MPTCP 262  /* IPPROTO_MPTCP */
#define NO_PORT 24 /* IP_BIND_ADDRESS_NO_PORT */
#define COOKIE 57  /* SO_COOKIE */

struct attempt {
	int fd;
	struct sockaddr_storage address;
	int length;
};

static void lacking(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(LACKING);
}

/* --- ways: each gives 0 or a negative error number ---------------------------------------------------------------- */

static int by_call(struct attempt *attempt)
{
	return syscall(SYS_bind, attempt->fd, &attempt->address, attempt->length) ? -errno : 0;
}

static void need_op_bind(int ring)
{
	struct io_uring_probe *probe = calloc(1, sizeof(*probe) + 256 * sizeof(probe->ops[0]));

	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_PROBE, probe, 256))
		lacking("IORING_REGISTER_PROBE", errno);
	if (!(probe->ops[OP_BIND].flags & IO_URING_OP_SUPPORTED))
		lacking("IORING_OP_BIND", EOPNOTSUPP);
	free(probe);
}

static int by_uring(struct attempt *attempt, unsigned setup, unsigned flags)
{
	struct io_uring_params params = {.flags = setup, .sq_thread_idle = 1};
	int ring = syscall(SYS_io_uring_setup, 1, &params);
	unsigned how = IORING_ENTER_GETEVENTS;
	struct io_uring_sqe *entry;
	char *queue, *done;

	if (ring < 0)
		lacking("io_uring_setup", errno);
	need_op_bind(ring);
	queue = mmap(NULL, params.sq_off.array + 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	entry = mmap(NULL, sizeof(*entry), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	done = mmap(NULL, params.cq_off.cqes + 2 * sizeof(struct io_uring_cqe), PROT_READ, MAP_SHARED, ring,
		    IORING_OFF_CQ_RING);
	memset(entry, 0, sizeof(*entry));
	entry->opcode = OP_BIND;
	entry->flags = flags;
	entry->fd = attempt->fd;
	entry->addr = (unsigned long)&attempt->address;
	entry->addr2 = attempt->length;
	if (flags & IOSQE_FIXED_FILE) { /* place in the ring's own table, which as a descriptor is something else */
		if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_FILES, &attempt->fd, 1))
			lacking("IORING_REGISTER_FILES", errno);
		entry->fd = 0;
	}
	__atomic_store_n((unsigned *)(queue + params.sq_off.tail), 1, __ATOMIC_SEQ_CST);
	if (setup & IORING_SETUP_SQPOLL)
		how |= IORING_ENTER_SQ_WAKEUP;
	if (syscall(SYS_io_uring_enter, ring, 1, 1, how, NULL, 0) < 0)
		lacking("io_uring_enter", errno);
	return ((struct io_uring_cqe *)(done + params.cq_off.cqes))->res;
}

/* The 32-bit entry into the kernel takes pointers of 32 bits. */
static long entry_of_32_bits(long number, long first, long second, long third)
{
#ifdef __x86_64__
	long result;

	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(number), "b"(first), "c"(second), "d"(third)
			 : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
#else
	(void)number, (void)first, (void)second, (void)third;
	return -ENOSYS;
#endif
}

/* Without the emulation the entry is a fault. */
static void no_entry(int signal)
{
	(void)signal;
	lacking("a 32-bit system call", ENOSYS);
}

static int by_32_bits(struct attempt *attempt, int socketcall)
{
	struct {
		unsigned arguments[4];
		struct sockaddr_storage address;
	} *low;
	int result;

#ifdef MAP_32BIT
	low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
#else
	low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
#endif
	signal(SIGSEGV, no_entry);
	if (entry_of_32_bits(20 /* getpid */, 0, 0, 0) != getpid())
		no_entry(0);
	signal(SIGSEGV, SIG_DFL);
	low->address = attempt->address;
	low->arguments[0] = attempt->fd;
	low->arguments[1] = (unsigned long)&low->address;
	low->arguments[2] = attempt->length;
	result = socketcall ? entry_of_32_bits(102, 2 /* SYS_BIND */, (long)low->arguments, 0)
			    : entry_of_32_bits(361, attempt->fd, (long)&low->address, attempt->length);
	return result;
}

static int make(struct attempt *attempt, const char *way)
{
	if (!strcmp(way, "call"))
		return by_call(attempt);
	if (!strcmp(way, "uring"))
		return by_uring(attempt, 0, 0);
	if (!strcmp(way, "sqpoll"))
		return by_uring(attempt, IORING_SETUP_SQPOLL, 0);
	if (!strcmp(way, "worker"))
		return by_uring(attempt, 0, IOSQE_ASYNC);
	if (!strcmp(way, "registered"))
		return by_uring(attempt, 0, IOSQE_FIXED_FILE);
	if (!strcmp(way, "compat"))
		return by_32_bits(attempt, 0);
	if (!strcmp(way, "socketcall"))
		return by_32_bits(attempt, 1);
	fprintf(stderr, "%s is no way; allowed are call, uring, sqpoll, worker, registered, compat, socketcall\n", way);
	exit(2);
}

/* --- what is bound -------------------------------------------------------------------------------------------------- */

static int made(int family, int type, int protocol)
{
	int fd = socket(family, type, protocol);

	if (fd < 0)
		lacking("socket", errno);
	return fd;
}

static void prepare(struct attempt *attempt, const char *what)
{
	struct sockaddr_in *v4 = (void *)&attempt->address;
	struct sockaddr_in6 *v6 = (void *)&attempt->address;
	int yes = 1;

	v4->sin_family = AF_INET;
	v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	attempt->length = sizeof(*v4);
	if (!strcmp(what, "given")) {
		attempt->fd = made(AF_INET, SOCK_STREAM, 0);
	} else if (!strcmp(what, "given6")) {
		attempt->fd = made(AF_INET6, SOCK_STREAM, 0);
		*v6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
		attempt->length = sizeof(*v6);
	} else if (!strcmp(what, "mptcp")) {
		attempt->fd = made(AF_INET, SOCK_STREAM, MPTCP);
	} else if (!strcmp(what, "absent")) { /* an address that this host has not: documentation's, RFC 5737 */
		attempt->fd = made(AF_INET, SOCK_STREAM, 0);
		v4->sin_port = htons(18451);
		v4->sin_addr.s_addr = htonl(0xc0000207);
	} else if (!strcmp(what, "long")) {
		attempt->fd = made(AF_INET, SOCK_STREAM, 0);
		attempt->length = sizeof(attempt->address) + 1;
	} else if (!strcmp(what, "closed")) {
		attempt->fd = 999;
		v4->sin_port = htons(53);
	} else if (!strcmp(what, "file")) {
		attempt->fd = open("/dev/null", O_RDONLY);
		v4->sin_port = htons(53);
	} else if (!strcmp(what, "raw")) {
		attempt->fd = made(AF_INET, SOCK_RAW, IPPROTO_ICMP);
		v4->sin_port = htons(7);
	} else if (!strcmp(what, "ping")) {
		attempt->fd = made(AF_INET, SOCK_DGRAM, IPPROTO_ICMP);
	} else if (!strcmp(what, "no-port")) {
		attempt->fd = made(AF_INET, SOCK_STREAM, 0);
		if (setsockopt(attempt->fd, IPPROTO_IP, NO_PORT, &yes, sizeof(yes)))
			lacking("IP_BIND_ADDRESS_NO_PORT", errno);
	} else {
		fprintf(stderr,
			"%s cannot be bound; allowed are given, given6, mptcp, absent, long, closed, file, raw, ping, no-port\n",
			what);
		exit(2);
	}
}

int main(int argc, char **argv)
{
	struct attempt attempt = {0};
	struct sockaddr_in6 name = {0}; /* the port is at the same place in both families */
	socklen_t length = sizeof(name);
	unsigned long long cookie = 0;
	int error;

	if (argc != 3) {
		fprintf(stderr, "usage: oddbind WAY WHAT\n");
		return 2;
	}
	prepare(&attempt, argv[2]);
	error = -make(&attempt, argv[1]);
	getsockname(attempt.fd, (struct sockaddr *)&name, &length);
	length = sizeof(cookie);
	getsockopt(attempt.fd, SOL_SOCKET, COOKIE, &cookie, &length);
	printf("%d %d %llu\n", error, ntohs(name.sin6_port), cookie);
	return 0;
}
