/* Every attempt to bind an inet or inet6 socket, for kernels without BTF: compiled by bcc on the node that it runs on,
 * against the headers of that kernel.
 *
 * What bindsnoop.bpf.c does with its tier kprobe, on the same functions and with the same record, in the C of Linux
 * 4.14: a perf buffer instead of the ring, no younger helper, no loop, at most 4096 instructions a program.
 * The loader defines CPUS, INFLIGHT and what is wanted. Order: knobs, maps, readers, body, handlers.
 */
#include <linux/cgroup-defs.h>
#include <linux/errno.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/kernfs.h>
#include <linux/mm_types.h>
#include <linux/net.h>
#include <linux/netdevice.h>
#include <linux/nsproxy.h>
#include <linux/ns_common.h>
#include <linux/sched.h>
#include <linux/tcp.h>
#include <linux/version.h>
#include <net/inet_sock.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "bind_event.h"

/* --- knobs ------------------------------------------------------------------------------------------------------ */

#ifndef CPUS
#define CPUS 1
#endif
#ifndef INFLIGHT
#define INFLIGHT 8192
#endif
/* Lists, as initializers: WANTED_PIDS 1, 2 and WANTED_PORTS {80, 80}, {8000, 8999}. */
#ifndef ONLY_SUCCESS
#define ONLY_SUCCESS 0
#endif

/* The longest request that the kernel reads: sizeof(struct sockaddr_storage). */
#define MAX_SOCKADDR_LEN 128

/* Each hash bucket of devices holds one in practice. */
#define MAX_DEVICES_WALKED 8
#define DEVICE_BUCKETS 256

/* --- maps ------------------------------------------------------------------------------------------------------- */

/* A call under way. A thread can be in several at once, one inside the other, but in each only once. */
enum call {
	CALL_SYSCALL = 1,  /* __sys_bind */
	CALL_SECURITY = 2, /* security_socket_bind */
	CALL_INET = 3,     /* inet_bind, inet6_bind */
	CALL_MPTCP = 4,    /* mptcp_bind */
};

/* What was asked for, from the beginning of the call to its end. */
struct asked {
	__u64 number;   /* tells one call from the next by the same thread */
	__u64 where;    /* the socket; of a system call, the address of the sockaddr in the process */
	__u32 fd;       /* of a system call */
	__u32 addr_len; /* as the process said */
	__u32 read_len; /* how much of the following is read */
	/* Where sockaddr_in and sockaddr_in6 have them. */
	__u16 family;
	__u16 port; /* network byte order */
	__u8 v4[4];
	__u8 v6[16];
	__u32 settled; /* whatever comes of the attempt, it is not for this call to report */
};

_Static_assert(sizeof(struct asked) == 56, "asked is 56 bytes, without a hole");

/* The bytes of struct asked that come from the sockaddr. */
#define SOCKADDR_BYTES 24

BPF_PERF_OUTPUT(events);
BPF_ARRAY(counters, struct bind_counters, CPUS);
BPF_HASH(inflight, __u64, struct asked, INFLIGHT);
/* Calls whose request found no room in `inflight`, so that nobody else reports or counts them too. */
BPF_TABLE("lru_hash", __u64, __u8, overflow, 256);

/* What a handler knows of an attempt. */
struct attempt {
	struct sock *sk; /* NULL: there is no socket */
	__u64 error;
	struct asked asked;
};

/* Too large for the stack, and what goes from one program to the next. No other runs on the same CPU meanwhile. */
BPF_PERCPU_ARRAY(attempts, struct attempt, 1);
BPF_PERCPU_ARRAY(slots, struct bind_event, 1);
/* The loader puts `report` there. One program for all handlers is verified once, and bcc compiles it once. */
BPF_PROG_ARRAY(reporter, 1);

/* --- readers: where the kernel keeps things --------------------------------------------------------------------- */

#define GET(type, pointer, field)                                                                     \
	({                                                                                             \
		type value_;                                                                           \
		_Static_assert(sizeof(value_) == sizeof((pointer)->field), #field " has another size"); \
		bpf_probe_read(&value_, sizeof(value_), (void *)&(pointer)->field);                    \
		value_;                                                                                \
	})

/* A bit-field has no address: the two bytes behind the field `after` are copied, and read through the same type. */
#define GET_BIT(pointer, after, bit)                                                         \
	({                                                                                    \
		typeof(*(pointer)) *copy_;                                                    \
		__u8 bytes_[2];                                                               \
		bpf_probe_read(bytes_, sizeof(bytes_), (void *)(&(pointer)->after + 1));      \
		copy_ = (void *)((unsigned long)bytes_ - offsetofend(typeof(*copy_), after)); \
		copy_->bit;                                                                   \
	})

static inline bool is_inet(__u16 family)
{
	return family == AF_INET || family == AF_INET6;
}

static inline __u16 get_family(struct sock *sk)
{
	return GET(__u16, sk, __sk_common.skc_family);
}

static inline struct sock *get_sk(__u64 socket)
{
	return GET(struct sock *, (struct socket *)socket, sk);
}

/* The socket behind a descriptor of the current process, NULL when it is none. */
static inline struct sock *get_sock(struct task_struct *task, __u32 fd)
{
	struct files_struct *open = GET(struct files_struct *, task, files);
	struct fdtable *fdt = GET(struct fdtable *, open, fdt);
	struct file **files, *file = NULL;
	struct socket *socket;

	if (fd >= GET(__u32, fdt, max_fds))
		return NULL;
	files = GET(struct file **, fdt, fd);
	bpf_probe_read(&file, sizeof(file), files + fd);
	socket = GET(struct socket *, file, private_data);
	/* Another thread may have put another kind of file there meanwhile: only a socket points back to its file. */
	if (!socket || GET(struct file *, socket, file) != file)
		return NULL;
	return GET(struct sock *, socket, sk);
}

static inline void get_type(struct bind_event *event, struct sock *sk)
{
#ifdef SK_FL_PROTO_SHIFT /* before Linux 5.6 (bf9765145b85, "sock: Make sk_protocol a 16-bit value") */
	__u32 flags;

	bpf_probe_read(&flags, sizeof(flags), (void *)&sk->__sk_flags_offset);
	event->proto = (flags & SK_FL_PROTO_MASK) >> SK_FL_PROTO_SHIFT;
	event->sock_type = (flags & SK_FL_TYPE_MASK) >> SK_FL_TYPE_SHIFT;
#else
	event->proto = GET(__u16, sk, sk_protocol);
	event->sock_type = GET(__u16, sk, sk_type);
#endif
}

static inline __u8 get_opts(struct sock *sk)
{
	struct inet_sock *inet = (void *)sk;
	__u8 opts = 0;

	opts |= !!GET_BIT(&sk->__sk_common, skc_state, skc_reuse) * OPT_REUSEADDR;
	opts |= GET_BIT(&sk->__sk_common, skc_state, skc_reuseport) * OPT_REUSEPORT;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0) /* c274af224269, "inet: introduce inet->inet_flags" */
	unsigned long flags = GET(unsigned long, inet, inet_flags);

	opts |= (flags >> INET_FLAGS_FREEBIND & 1) * OPT_FREEBIND;
	opts |= (flags >> INET_FLAGS_TRANSPARENT & 1) * OPT_TRANSPARENT;
	opts |= (flags >> INET_FLAGS_BIND_ADDRESS_NO_PORT & 1) * OPT_BIND_ADDRESS_NO_PORT;
#else
	opts |= GET_BIT(inet, pmtudisc, freebind) * OPT_FREEBIND;
	opts |= GET_BIT(inet, pmtudisc, transparent) * OPT_TRANSPARENT;
	opts |= GET_BIT(inet, pmtudisc, bind_address_no_port) * OPT_BIND_ADDRESS_NO_PORT;
#endif
	return opts;
}

/* A subflow of a multipath socket: mptcp_bind calls inet_bind for it, before Linux 6.6. */
static inline bool is_subflow(struct sock *sk)
{
#if IS_ENABLED(CONFIG_MPTCP)
	return GET(__u16, sk, sk_protocol) == IPPROTO_TCP && GET(bool, (struct tcp_sock *)sk, is_mptcp);
#else
	return false;
#endif
}

/* Name of a device in a network namespace; left as it is when the device is gone. */
static inline void get_ifname(char *name, struct net *net, __u32 ifindex)
{
	struct hlist_head *buckets = GET(struct hlist_head *, net, dev_index_head);
	struct hlist_node *node = NULL;
	int i;

	bpf_probe_read(&node, sizeof(node), buckets + (ifindex & (DEVICE_BUCKETS - 1)));
#pragma unroll
	for (i = 0; i < MAX_DEVICES_WALKED; i++) {
		struct net_device *device = (void *)node - offsetof(struct net_device, index_hlist);

		if (!node)
			return;
		if (GET(__u32, device, ifindex) == ifindex) {
			bpf_probe_read_str(name, 16, (void *)&device->name);
			return;
		}
		node = GET(struct hlist_node *, node, next);
	}
}

/* The kernel keeps this one to itself (fs/mount.h). */
struct mnt_namespace {
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 11, 0) /* 1a7b8969e664, "mnt: Use generic ns_common::count" */
	atomic_t count;
#endif
	struct ns_common ns;
};

static inline struct cgroup *get_parent(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *parent = GET(struct cgroup_subsys_state *, cgroup, self.parent);

	return GET(struct cgroup *, parent, cgroup);
}

static inline struct cgroup *get_controller_cgroup(struct css_set *set, int controller)
{
	struct cgroup_subsys_state *css = GET(struct cgroup_subsys_state *, set, subsys[controller]);

	return GET(struct cgroup *, css, cgroup);
}

static inline long get_cgroup_name(char *name, unsigned int size, struct cgroup *cgroup)
{
	struct kernfs_node *node = GET(struct kernfs_node *, cgroup, kn);

	return bpf_probe_read_str(name, size, GET(char *, node, name));
}

/* The name of a container above the parent, as in bindsnoop.bpf.c. */
static inline void get_ancestor(struct bind_event *event, struct cgroup *parent)
{
	struct cgroup *cgroup = get_parent(parent), *above = NULL;
	char *name = event->cgroup_parent;
	int touched = 0, i;

#pragma unroll
	for (i = 0; i < MAX_ANCESTORS; i++) {
		if (cgroup)
			above = get_parent(cgroup);
		if (!cgroup || !above) /* the root has no name */
			break;
		touched = 1;
		if (get_cgroup_name(name, CONTAINER_ID_LEN + 1, cgroup) > CONTAINER_ID_LEN) {
			get_cgroup_name(name, sizeof(event->cgroup_parent), cgroup);
			return;
		}
		cgroup = above;
	}
	if (touched) {
		__builtin_memset(name, 0, CONTAINER_ID_LEN);
		get_cgroup_name(name, sizeof(event->cgroup_parent), parent);
	}
}

/* Id of the process's cgroup, its name and its parent's; as in bindsnoop.bpf.c. */
static inline void get_cgroup(struct bind_event *event, struct task_struct *task)
{
	struct css_set *set = GET(struct css_set *, task, cgroups);
	struct cgroup *cgroup = GET(struct cgroup *, set, dfl_cgrp);
	struct kernfs_node *node = GET(struct kernfs_node *, cgroup, kn);
	struct cgroup *parent = get_parent(cgroup);
	long own, above;

	event->cgroup_id = GET(__u64, node, id);
	/* Inode and generation before Linux 5.5 (67c0496e87d1, "kernfs: convert kernfs_node->id from union to u64"). */
	if (!__builtin_types_compatible_p(typeof(node->id), __u64))
		event->cgroup_id = (__u32)event->cgroup_id;
#if IS_ENABLED(CONFIG_MEMCG)
	if (!parent) {
		cgroup = get_controller_cgroup(set, memory_cgrp_id);
		parent = get_parent(cgroup);
	}
#endif
#if IS_ENABLED(CONFIG_CGROUP_PIDS)
	if (!parent) {
		cgroup = get_controller_cgroup(set, pids_cgrp_id);
		parent = get_parent(cgroup);
	}
#endif
	if (!parent) /* the root everywhere: no name */
		return;
	own = get_cgroup_name(event->cgroup, sizeof(event->cgroup), cgroup);
	above = get_cgroup_name(event->cgroup_parent, sizeof(event->cgroup_parent), parent);
	if (own <= CONTAINER_ID_LEN && above <= CONTAINER_ID_LEN)
		get_ancestor(event, parent);
}

/* --- body: one attempt ------------------------------------------------------------------------------------------ */

static inline struct bind_counters *get_counters(void)
{
	int cpu = bpf_get_smp_processor_id();

	return counters.lookup(&cpu);
}

/* Reads the kernel's copy of the request. Behind its end is more of the kernel's stack, which nobody looks at. */
static inline void read_kernel_request(struct asked *asked, const void *sockaddr)
{
	if (!bpf_probe_read(&asked->family, SOCKADDR_BYTES, (void *)sockaddr))
		asked->read_len = asked->addr_len;
}

/* Reads the request from the process's memory, as far as the process says that it goes. */
static inline void read_request(struct asked *asked)
{
	const void *sockaddr = (void *)asked->where;

	if (asked->addr_len < 2 || bpf_probe_read(&asked->family, 2, sockaddr))
		return;
	asked->read_len = 2;
	if (asked->addr_len < 4 || bpf_probe_read(&asked->port, 2, sockaddr + 2))
		return;
	asked->read_len = 4;
	if (asked->addr_len < 8 || bpf_probe_read(asked->v4, 4, sockaddr + 4))
		return;
	asked->read_len = 8;
	if (asked->addr_len >= 24 && !bpf_probe_read(asked->v6, 16, sockaddr + 8))
		asked->read_len = 24;
}

static inline __u16 get_asked_family(struct asked *asked)
{
	return asked->read_len >= sizeof(asked->family) ? asked->family : AF_UNSPEC;
}

static inline void fill_process(struct bind_event *event, struct task_struct *task)
{
	struct task_struct *parent = GET(struct task_struct *, task, real_parent);
	struct nsproxy *nsproxy = GET(struct nsproxy *, task, nsproxy);
	struct mnt_namespace *mounts = GET(struct mnt_namespace *, nsproxy, mnt_ns);
	struct mm_struct *mm = GET(struct mm_struct *, task, mm);
	struct file *exe = GET(struct file *, mm, exe_file);
	struct dentry *dentry = GET(struct dentry *, exe, f_path.dentry);
	__u64 thread = bpf_get_current_pid_tgid();
	__u64 owner = bpf_get_current_uid_gid();

	event->pid = thread >> 32;
	event->tid = (__u32)thread;
	event->ppid = GET(__u32, parent, tgid);
	event->uid = (__u32)owner;
	event->gid = owner >> 32;
	event->mountnsid = GET(__u32, mounts, ns.inum);
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	parent = GET(struct task_struct *, parent, group_leader);
	bpf_probe_read_str(event->parent_comm, sizeof(event->parent_comm), (void *)&parent->comm);
	bpf_probe_read_str(event->exe, sizeof(event->exe), GET(char *, dentry, d_name.name));
	get_cgroup(event, task);
}

static inline void fill_socket(struct bind_event *event, struct sock *sk, struct net *net)
{
	event->known |= KNOWN_SOCKET;
	event->family = get_family(sk);
	get_type(event, sk);
	event->port = GET(__u16, sk, __sk_common.skc_num);
	event->opts = get_opts(sk);
	event->cookie = GET(__u64, sk, __sk_common.skc_cookie);
	/* The receiving address: of a multicast bind the sending one is 0. */
	if (event->family == AF_INET6) {
		event->v6only = GET_BIT(&sk->__sk_common, skc_state, skc_ipv6only);
#if IS_ENABLED(CONFIG_IPV6)
		bpf_probe_read(event->addr, 16, (void *)&sk->__sk_common.skc_v6_rcv_saddr);
#endif
	} else {
		bpf_probe_read(event->addr, 4, (void *)&sk->__sk_common.skc_rcv_saddr);
	}
	/* Read late: bind itself may set it, from a scope id. */
	event->ifindex = GET(__u32, sk, __sk_common.skc_bound_dev_if);
	if (event->ifindex)
		get_ifname(event->ifname, net, event->ifindex);
}

static inline void fill_request(struct bind_event *event, struct asked *asked)
{
	__u16 family = get_asked_family(asked);

	if (!(event->known & KNOWN_SOCKET))
		event->family = family;
	else if (family == AF_UNSPEC) /* IPv4 sockets take it, for the wildcard */
		family = event->family;
	if (!is_inet(family) || asked->read_len < 4)
		return;
	event->asked_family = family;
	event->asked_port = __builtin_bswap16(asked->port);
	event->known |= KNOWN_ASKED_PORT;
	if (family == AF_INET && asked->read_len >= 8) {
		__builtin_memcpy(event->asked_addr, asked->v4, 4);
		event->known |= KNOWN_ASKED_ADDR;
	} else if (family == AF_INET6 && asked->read_len >= 24) {
		__builtin_memcpy(event->asked_addr, asked->v6, 16);
		event->known |= KNOWN_ASKED_ADDR;
	}
}

static inline struct net *find_net(struct attempt *attempt, struct task_struct *task)
{
	struct nsproxy *nsproxy;

	if (attempt->sk)
		return GET(struct net *, attempt->sk, __sk_common.skc_net.net);
	nsproxy = GET(struct nsproxy *, task, nsproxy);
	return GET(struct net *, nsproxy, net_ns);
}

static inline void fill_event(struct bind_event *event, struct attempt *attempt)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = find_net(attempt, task);

	__builtin_memset(event, 0, sizeof(*event));
	event->boottime_ns = bpf_ktime_get_ns(); /* CLOCK_MONOTONIC: the reader adds what the machine slept */
	event->hook = HOOK_BCC;
	event->error = attempt->error;
	fill_process(event, task);
	event->netnsid = GET(__u32, net, ns.inum);
	if (attempt->sk)
		fill_socket(event, attempt->sk, net);
	fill_request(event, &attempt->asked);
}

/* What nobody asked for costs nothing. */
static inline bool is_wanted(struct attempt *attempt)
{
	bool found = true;
	int i;

	if (ONLY_SUCCESS && attempt->error)
		return false;
#ifdef WANTED_PIDS
	__u32 pid = bpf_get_current_pid_tgid() >> 32;
	const __u32 pids[] = {WANTED_PIDS};

	found = false;
#pragma unroll
	for (i = 0; i < sizeof(pids) / sizeof(*pids); i++)
		found |= pid == pids[i];
	if (!found)
		return false;
#endif
#ifdef WANTED_PORTS
	__u16 got = 0, port = 0;
	const struct bind_ports ports[] = {WANTED_PORTS};

	if (attempt->sk)
		got = GET(__u16, attempt->sk, __sk_common.skc_num);
	if (attempt->asked.read_len >= 4)
		port = __builtin_bswap16(attempt->asked.port);
	found = false;
#pragma unroll
	for (i = 0; i < sizeof(ports) / sizeof(*ports); i++)
		found |= (got >= ports[i].first && got <= ports[i].last) ||
			 (port >= ports[i].first && port <= ports[i].last);
#endif
	return found;
}

/* Counts one attempt and puts it into the perf buffer. */
int report(struct pt_regs *ctx)
{
	struct bind_counters *counts = get_counters();
	int zero = 0;
	struct attempt *attempt = attempts.lookup(&zero);
	struct bind_event *event = slots.lookup(&zero);

	if (!counts || !attempt || !event || !is_wanted(attempt))
		return 0;
	fill_event(event, attempt);
	counts->attempted++;
	if (events.perf_submit(ctx, event, sizeof(*event)))
		counts->lost_ring_full++;
	else
		counts->submitted++;
	return 0;
}

/* Counts an attempt that ends up nowhere, under its cause. */
#define COUNT_LOST(cause)                                       \
	({                                                      \
		struct bind_counters *counts_ = get_counters(); \
		if (counts_) {                                  \
			counts_->attempted++;                   \
			counts_->cause++;                       \
		}                                               \
	})

/* Counts what may have been an attempt and went past a hook that was not run. */
static inline void count_skipped(void)
{
	struct bind_counters *counts = get_counters();

	if (counts)
		counts->skipped++;
}

/* --- body: calls under way -------------------------------------------------------------------------------------- */

static inline __u64 get_key(enum call call)
{
	return bpf_get_current_pid_tgid() | (__u64)call << 56;
}

static inline bool is_under_way(enum call call)
{
	__u64 key = get_key(call);

	return inflight.lookup(&key) || overflow.lookup(&key);
}

/* The attempt has come further than this call decides. That its end may be missed then is no loss: ends are, when more
 * threads are between beginning and end than the kernel has room for.
 */
static inline void settle(enum call call)
{
	__u64 key = get_key(call);
	struct asked *asked = inflight.lookup(&key);

	if (asked)
		asked->settled = true;
}

static inline void forget(enum call call)
{
	__u64 key = get_key(call);

	inflight.delete(&key);
}

/* Remembers a request until its call returns; false when there is no room, and then only that is remembered. */
static inline bool remember(enum call call, struct asked *asked)
{
	struct bind_counters *counts = get_counters();
	__u64 key = get_key(call);
	struct asked *missed;
	__u8 yes = 1;
	int error;

	if (!counts)
		return true;
	asked->number = ++counts->entered << 16 | bpf_get_smp_processor_id();
	/* What is still remembered when the same thread makes the same call again is one whose end was never seen. */
	missed = inflight.lookup(&key);
	if (missed && !missed->settled) {
		if (call == CALL_INET || call == CALL_MPTCP) {
			counts->attempted++;
			counts->lost_return_missed++;
		} else {
			counts->skipped++;
		}
	}
	error = inflight.update(&key, asked);
	if (error)
		overflow.update(&key, &yes);
	return !error;
}

/* Whether there was no room for the request of the call that ends now. */
static inline bool was_overflow(enum call call)
{
	__u64 key = get_key(call);

	return !overflow.delete(&key);
}

/* The end of a handler: reports what it found and forgets the call. */
static inline void submit(struct pt_regs *ctx, enum call call, struct asked *asked, struct sock *sk)
{
	int zero = 0;
	struct attempt *attempt = attempts.lookup(&zero);

	if (!attempt)
		return;
	attempt->sk = sk;
	attempt->error = (__u32)-(int)PT_REGS_RC(ctx);
	attempt->asked = *asked;
	forget(call);
	reporter.call(ctx, 0);
	count_skipped(); /* never reached: `report` takes over */
}

/* --- handlers --------------------------------------------------------------------------------------------------- */

/* mptcp_bind reports this one, as what it is. */
static inline bool is_within_mptcp(enum call call, struct sock *sk)
{
	return call == CALL_INET && is_subflow(sk) && is_under_way(CALL_MPTCP);
}

/* A call with the kernel's copy of the request. A cgroup program may rewrite that copy, so it is read at once. */
static inline bool enter(enum call call, struct pt_regs *ctx, bool settled)
{
	struct asked asked = {.where = PT_REGS_PARM1(ctx), .addr_len = PT_REGS_PARM3(ctx), .settled = settled};

	read_kernel_request(&asked, (void *)PT_REGS_PARM2(ctx));
	return remember(call, &asked);
}

static inline int enter_protocol(enum call call, struct pt_regs *ctx)
{
	bool within_mptcp = is_within_mptcp(call, get_sk(PT_REGS_PARM1(ctx)));

	settle(CALL_SYSCALL);
	settle(CALL_SECURITY);
	if (!enter(call, ctx, within_mptcp) && !within_mptcp)
		COUNT_LOST(lost_inflight_full);
	return 0;
}

static inline int leave_protocol(enum call call, struct pt_regs *ctx)
{
	__u64 key = get_key(call);
	struct asked *asked = inflight.lookup(&key);

	if (!asked) {
		if (!was_overflow(call))
			count_skipped();
		return 0;
	}
	if (asked->settled)
		forget(call);
	else
		submit(ctx, call, asked, get_sk(asked->where));
	return 0;
}

int enter_inet(struct pt_regs *ctx)
{
	return enter_protocol(CALL_INET, ctx);
}

int leave_inet(struct pt_regs *ctx)
{
	return leave_protocol(CALL_INET, ctx);
}

int enter_mptcp(struct pt_regs *ctx)
{
	return enter_protocol(CALL_MPTCP, ctx);
}

int leave_mptcp(struct pt_regs *ctx)
{
	return leave_protocol(CALL_MPTCP, ctx);
}

/* Sockets of every family come by here. */
int enter_security(struct pt_regs *ctx)
{
	struct sock *sk = get_sk(PT_REGS_PARM1(ctx));

	settle(CALL_SYSCALL);
	enter(CALL_SECURITY, ctx, !is_inet(get_family(sk)));
	return 0;
}

/* A denial by a security module is the end of the attempt. */
int leave_security(struct pt_regs *ctx)
{
	__u64 key = get_key(CALL_SECURITY);
	struct asked *asked = inflight.lookup(&key);
	bool denied = (int)PT_REGS_RC(ctx);

	if (!asked) {
		bool full = was_overflow(CALL_SECURITY);

		if (denied && full)
			COUNT_LOST(lost_inflight_full);
		else if (denied)
			count_skipped();
		return 0;
	}
	if (denied && !asked->settled)
		submit(ctx, CALL_SECURITY, asked, get_sk(asked->where));
	else
		forget(CALL_SECURITY);
	return 0;
}

/* __sys_bind, and before Linux 4.17 the system call itself: the same three arguments. */
int enter_syscall(struct pt_regs *ctx)
{
	struct asked asked = {
		.fd = PT_REGS_PARM1(ctx),
		.where = PT_REGS_PARM2(ctx),
		.addr_len = PT_REGS_PARM3(ctx),
	};

	remember(CALL_SYSCALL, &asked);
	return 0;
}

/* What ends before all others have seen it: there is no socket, or no address that could be read. */
static inline void leave_early(struct pt_regs *ctx, struct asked *asked, int error)
{
	int addr_len = asked->addr_len;
	bool no_socket = error == EBADF || error == ENOTSOCK;
	bool bad_length = error == EINVAL && (addr_len < 0 || addr_len > MAX_SOCKADDR_LEN);
	bool unreadable = error == EFAULT && addr_len;
	struct sock *sk;

	if (!no_socket && !bad_length && !unreadable)
		return;
	sk = get_sock((void *)bpf_get_current_task(), asked->fd);
	read_request(asked);
	if (no_socket) {
		/* With a socket it is the word of somebody who has seen the request, and has been reported. */
		if (sk || !is_inet(get_asked_family(asked)))
			return;
	} else if (!sk || !is_inet(get_family(sk))) {
		return;
	}
	if (!unreadable)
		submit(ctx, CALL_SYSCALL, asked, sk);
	else if (!asked->read_len)
		COUNT_LOST(faulted);
}

int leave_syscall(struct pt_regs *ctx)
{
	__u64 key = get_key(CALL_SYSCALL);
	struct asked *asked = inflight.lookup(&key);
	int error = -(int)PT_REGS_RC(ctx);
	bool full;

	if (asked) {
		if (!asked->settled)
			leave_early(ctx, asked, error);
		forget(CALL_SYSCALL);
		return 0;
	}
	full = was_overflow(CALL_SYSCALL);
	if (error != EBADF && error != ENOTSOCK)
		return 0;
	if (full)
		COUNT_LOST(lost_inflight_full);
	else
		count_skipped();
	return 0;
}
