/* The record that the kernel side writes and pipeline/records.py reads: one attempt to bind.
 *
 * One fixed size, a multiple of 8, no hole that the compiler chooses: every byte of a slot is written. Numbers are in
 * host byte order, addresses in network byte order. tests/test_records.py compares each offset with Python's.
 */
#ifndef BINDSNOOP_BIND_EVENT_H
#define BINDSNOOP_BIND_EVENT_H

/* Where the attempt was seen; `hook` in the record. */
enum bind_hook {
	HOOK_FEXIT = 1,
	HOOK_KPROBE = 2,
	HOOK_TRACEPOINT = 3,
	HOOK_POST_BIND = 4,
	HOOK_LSM = 5,
	HOOK_BCC = 6,
};

/* What of the record is known; bits of `known`. */
enum bind_known {
	KNOWN_ASKED_PORT = 1 << 0, /* asked_port */
	KNOWN_ASKED_ADDR = 1 << 1, /* asked_addr, read as asked_family says */
	KNOWN_SOCKET = 1 << 2,     /* everything that is read from the socket */
};

/* Options of the socket; bits of `opts`. */
enum bind_opts {
	OPT_FREEBIND = 0x01,
	OPT_TRANSPARENT = 0x02,
	OPT_BIND_ADDRESS_NO_PORT = 0x04,
	OPT_REUSEADDR = 0x08,
	OPT_REUSEPORT = 0x10,
};

struct bind_event {
	__u64 boottime_ns; /* end of the attempt, CLOCK_BOOTTIME */
	__u64 cgroup_id;   /* of the process, version 2 hierarchy */
	__u64 cookie;      /* of the socket, 0 when the kernel has not given one */
	__u32 pid;         /* thread group, initial pid namespace */
	__u32 tid;
	__u32 ppid;
	__u32 uid; /* real, initial user namespace */
	__u32 gid;
	__u32 mountnsid; /* inode numbers of namespaces */
	__u32 netnsid;   /* the socket's, else the process's */
	__u32 ifindex;   /* of the device that the socket is bound to, 0 for none */
	__u32 error;     /* positive errno, 0 is success */
	__u16 family;    /* the socket's, else the one asked for */
	__u16 sock_type;
	__u16 proto;
	__u16 asked_family; /* how to read asked_addr: AF_INET or AF_INET6 */
	__u16 asked_port;
	__u16 port; /* what the socket holds after the attempt */
	__u8 known; /* enum bind_known */
	__u8 hook;  /* enum bind_hook */
	__u8 opts;  /* enum bind_opts */
	__u8 v6only;
	__u8 pad[4];
	__u8 asked_addr[16]; /* IPv4 in the first four bytes */
	__u8 addr[16];       /* what the socket holds after the attempt, read as family says */
	char ifname[16];

	/* Who: one block of 288 bytes, because records.py names it as one. NUL-terminated, NUL-filled. */
	char comm[16];        /* the thread's */
	char parent_comm[16]; /* the parent process's */
	char exe[64];         /* file name of the executable */
	char cgroup[96];      /* name of the process's cgroup */
	char cgroup_parent[96]; /* its parent's, or the nearest above whose name is long enough for a container's id */
};

#define CONTAINER_ID_LEN 64
#define MAX_ANCESTORS 6 /* looked at above the parent */

_Static_assert(sizeof(struct bind_event) == 416, "bind_event is 416 bytes, without a hole");
_Static_assert(sizeof(struct bind_event) % 8 == 0, "slots of the ring are multiples of 8");

#define MAX_WANTED 16

struct bind_ports {
	__u16 first;
	__u16 last; /* included */
};

/* What the loader sets before it loads. Attempts that are not wanted are neither reported nor counted. */
struct bind_knobs {
	__u64 wakeup_bytes; /* wake the reader when so many bytes wait */
	__u32 pid_count;    /* 0: every process */
	__u32 port_count;   /* 0: every port */
	__u32 only_success;
	__u32 pids[MAX_WANTED]; /* thread groups */
	struct bind_ports ports[MAX_WANTED];
	__u32 spares; /* whether those are attached */
};

_Static_assert(sizeof(struct bind_knobs) == 152, "bind_knobs is 152 bytes, without a hole");

/* One a CPU and one for the reader's own counts, each a cache line of its own, never reset:
 * attempted = submitted + lost_ring_full + lost_inflight_full + lost_return_missed + faulted, exact when no attempt is
 * under way.
 */
struct bind_counters {
	__u64 attempted;
	__u64 submitted;
	__u64 lost_ring_full;     /* no free slot in the ring */
	__u64 lost_inflight_full; /* no room to remember the request until the call returns */
	__u64 lost_return_missed; /* the call began, and its end was never seen */
	__u64 faulted;            /* EFAULT: the request could not be read, so there is nothing to report */
	__u64 skipped;            /* ends without a beginning, and other hooks that were passed by: each may be a loss */
	__u64 entered;            /* gives each request in flight a number */
};

_Static_assert(sizeof(struct bind_counters) == 64, "bind_counters is a cache line");

/* What the loader writes while the programs run, for them and for loaders to come; times are CLOCK_BOOTTIME, 0 is none. */
struct bind_control {
	__u64 opened_ns; /* every program was attached */
	__u64 closed_ns; /* programs do nothing from here on: they may outlive who attached them */
	__u64 since_ns;  /* what ended before is the business of the tracer before this one */
	__u64 until_ns;  /* what ended here or later is the business of the tracer after this one */
	__u64 earlier;   /* so many records in the ring ended before since_ns */
	__u64 later;     /* so many ended at until_ns or later */
};

_Static_assert(sizeof(struct bind_control) == 48, "bind_control is 48 bytes, without a hole");

#endif
