/* Binds that do not come through the system call of a native process: oddbind uring|compat
 *
 * Binds a TCP socket to 127.0.0.1:0 and prints the port that it got. Exit code 77: this kernel cannot do that.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OP_BIND 56 /* IORING_OP_BIND, Linux 6.11 */

static int by_uring(int fd, struct sockaddr_in *address)
{
	struct io_uring_params params = {0};
	int ring = syscall(SYS_io_uring_setup, 1, &params);
	struct io_uring_sqe *entry;
	char *queue, *done;

	if (ring < 0)
		return 77;
	queue = mmap(NULL, params.sq_off.array + 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	entry = mmap(NULL, sizeof(*entry), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	done = mmap(NULL, params.cq_off.cqes + 2 * sizeof(struct io_uring_cqe), PROT_READ, MAP_SHARED, ring,
		    IORING_OFF_CQ_RING);
	memset(entry, 0, sizeof(*entry));
	entry->opcode = OP_BIND;
	entry->fd = fd;
	entry->addr = (unsigned long)address;
	entry->addr2 = sizeof(*address);
	*(unsigned *)(queue + params.sq_off.tail) = 1;
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return 1;
	return ((struct io_uring_cqe *)(done + params.cq_off.cqes))->res == 0 ? 0 : 77;
}

static int by_compat(int fd, struct sockaddr_in *address)
{
#ifdef __x86_64__
	struct sockaddr_in *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	long result;

	*low = *address;
	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(361L), "b"((long)fd), "c"(low), "d"((long)sizeof(*low))
			 : "memory", "r8", "r9", "r10", "r11");
	return result == -ENOSYS ? 77 : result != 0;
#else
	(void)fd;
	(void)address;
	return 77;
#endif
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t length = sizeof(address);
	int fd = socket(AF_INET, SOCK_STREAM, 0), result;

	if (argc != 2)
		return 2;
	result = strcmp(argv[1], "uring") ? by_compat(fd, &address) : by_uring(fd, &address);
	if (result)
		return result;
	if (getsockname(fd, (struct sockaddr *)&address, &length))
		return 1;
	printf("%d\n", ntohs(address.sin_port));
	return 0;
}
