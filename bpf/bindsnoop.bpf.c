/* Every attempt to bind an inet or inet6 socket, as one struct bind_event in the ring.
 *
 * Tiers differ in where they look; loader and reader choose programs by name, and all programs share one body,
 * submit(). Order: knobs, maps, readers, body, handlers.
 *
 *   tracepoint  tracepoint_enter, tracepoint_exit: bind() of native processes, failed ones too, with the request.
 *               post_bind4, post_bind6: what those miss and succeeds: io_uring, 32-bit processes, the kernel itself.
 */
#include "kernel_types.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "bind_event.h"

char LICENSE[] SEC("license") = "GPL";

/* --- knobs ------------------------------------------------------------------------------------------------------ */

const volatile struct bind_knobs knobs SEC(".rodata.knobs") = {
	.wakeup_bytes = 1 << 20,
};

/* A producer that passes the mark wakes the reader, and so do the next few: two that pass it at once would each see
 * the other's bytes too. Waking on every event above the mark would cost more than the event.
 */
#define WAKEUP_WINDOW (8 * sizeof(struct bind_event))

/* Each hash bucket of devices holds one in practice. */
#define MAX_DEVICES_WALKED 8
#define DEVICE_BUCKETS 256

/* --- maps ------------------------------------------------------------------------------------------------------- */

/* What the thread asked for, from the entry of the system call to its end. */
struct request {
	__u64 user_addr;
	__u32 fd;
	__u32 addr_len; /* as the process said */
	__u32 read_len; /* how much of sockaddr is read */
	union {
		struct {
			__u16 family;
			__be16 port;
			__u8 v4[4];
			__u8 v6[16];
			__u32 scope;
		};
		__u8 sockaddr[28];
	};
};

_Static_assert(sizeof(struct request) == 48, "request is 48 bytes, without a hole");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20); /* the loader sets it */
} ring SEC(".maps");

/* An array that the reader maps, with a slot a CPU: reading a per-CPU map is a system call during which the kernel
 * skips programs on that CPU, and the counters of losses must not cause any.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* the loader sets it: the number of CPUs */
	__type(key, __u32);
	__type(value, struct bind_counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64); /* thread group << 32 | thread */
	__type(value, struct request);
} inflight SEC(".maps");

/* Threads whose request found no room in `inflight`: counted as lost at once, so post_bind must not report them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 256);
	__type(key, __u64);
	__type(value, __u8);
} overflow SEC(".maps");

/* --- readers: where the kernel keeps things --------------------------------------------------------------------- */

static __always_inline __u16 swap16(__u16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline bool is_inet(__u16 family)
{
	return family == AF_INET || family == AF_INET6;
}

static __always_inline __u16 get_family(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_family);
}

/* The socket behind a descriptor of the current process, NULL when it is none. */
static __always_inline struct sock *get_sock(struct task_struct *task, __u32 fd)
{
	struct fdtable *fdt = BPF_CORE_READ(task, files, fdt);
	struct file **files, *file = NULL;
	struct socket *socket;

	if (fd >= BPF_CORE_READ(fdt, max_fds))
		return NULL;
	files = BPF_CORE_READ(fdt, fd);
	bpf_probe_read_kernel(&file, sizeof(file), files + fd);
	socket = BPF_CORE_READ(file, private_data);
	/* Another thread may have put another kind of file there meanwhile: only a socket points back to its file. */
	if (!socket || BPF_CORE_READ(socket, file) != file)
		return NULL;
	return BPF_CORE_READ(socket, sk);
}

static __always_inline __u8 get_opts(struct sock *sk)
{
	struct inet_sock *inet = (void *)sk;
	struct inet_sock___before_6_6 *old = (void *)sk;
	__u8 opts = 0;

	if (BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_reuse))
		opts |= OPT_REUSEADDR;
	if (BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_reuseport))
		opts |= OPT_REUSEPORT;
	if (bpf_core_field_exists(inet->inet_flags)) {
		unsigned long flags = BPF_CORE_READ(inet, inet_flags);

		opts |= (flags >> INET_FLAGS_FREEBIND & 1) * OPT_FREEBIND;
		opts |= (flags >> INET_FLAGS_TRANSPARENT & 1) * OPT_TRANSPARENT;
		opts |= (flags >> INET_FLAGS_BIND_ADDRESS_NO_PORT & 1) * OPT_BIND_ADDRESS_NO_PORT;
	} else if (bpf_core_field_exists(old->freebind)) {
		if (BPF_CORE_READ_BITFIELD_PROBED(old, freebind))
			opts |= OPT_FREEBIND;
		if (BPF_CORE_READ_BITFIELD_PROBED(old, transparent))
			opts |= OPT_TRANSPARENT;
		if (BPF_CORE_READ_BITFIELD_PROBED(old, bind_address_no_port))
			opts |= OPT_BIND_ADDRESS_NO_PORT;
	}
	return opts;
}

/* Name of a device in a network namespace; left as it is when the device is gone. */
static __always_inline void get_ifname(char *name, struct net *net, __u32 ifindex)
{
	struct hlist_head *buckets;
	struct hlist_node *node = NULL;
	int i;

	if (!bpf_core_field_exists(net->dev_index_head))
		return;
	buckets = BPF_CORE_READ(net, dev_index_head);
	bpf_probe_read_kernel(&node, sizeof(node), buckets + (ifindex & (DEVICE_BUCKETS - 1)));
	for (i = 0; i < MAX_DEVICES_WALKED && node; i++) {
		struct net_device *device = (void *)node - bpf_core_field_offset(struct net_device, index_hlist);

		if (BPF_CORE_READ(device, ifindex) == (int)ifindex) {
			bpf_probe_read_kernel_str(name, 16, &device->name);
			return;
		}
		node = BPF_CORE_READ(node, next);
	}
}

static __always_inline struct kernfs_node *get_parent(struct kernfs_node *node)
{
	struct kernfs_node___before_6_15 *old = (void *)node;

	if (bpf_core_field_exists(node->__parent))
		return BPF_CORE_READ(node, __parent);
	return BPF_CORE_READ(old, parent);
}

/* The process's directory in the hierarchy of one controller. */
static __always_inline struct kernfs_node *get_controller_node(struct css_set *set, __u32 controller)
{
	struct cgroup_subsys_state *css = NULL;

	bpf_probe_read_kernel(&css, sizeof(css),
			      (void *)set + bpf_core_field_offset(struct css_set, subsys) + controller * sizeof(css));
	return BPF_CORE_READ(css, cgroup, kn);
}

/* Id of the process's cgroup, its name and its parent's.
 *
 * The id is always of version 2. Where containers live in hierarchies of version 1, version 2 says only "root": there
 * the names are those of the memory controller's hierarchy, or of pids'.
 */
static __always_inline void get_cgroup(struct bind_event *event, struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	struct kernfs_node *node = BPF_CORE_READ(set, dfl_cgrp, kn);
	struct kernfs_node *parent = get_parent(node);

	event->cgroup_id = BPF_CORE_READ(node, id);
	if (!parent && bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id)) {
		node = get_controller_node(set, bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id));
		parent = get_parent(node);
	}
	if (!parent && bpf_core_enum_value_exists(enum cgroup_subsys_id, pids_cgrp_id)) {
		node = get_controller_node(set, bpf_core_enum_value(enum cgroup_subsys_id, pids_cgrp_id));
		parent = get_parent(node);
	}
	if (!parent) /* the root everywhere: no name */
		return;
	bpf_probe_read_kernel_str(event->cgroup, sizeof(event->cgroup), BPF_CORE_READ(node, name));
	bpf_probe_read_kernel_str(event->cgroup_parent, sizeof(event->cgroup_parent), BPF_CORE_READ(parent, name));
}

/* --- body: one attempt ------------------------------------------------------------------------------------------ */

/* What a handler knows of an attempt. */
struct attempt {
	struct task_struct *task;
	struct sock *sk;         /* NULL: there is no socket */
	struct request *request; /* NULL: the hook cannot see it */
	__u64 cookie;
	__u32 error;
	__u8 hook;
};

static __always_inline struct bind_counters *get_counters(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&counters, &cpu);
}

/* Handlers of cgroups can be preempted, so another may count on the same CPU in the middle. */
static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

/* Reads the request from the process's memory; it may not be there yet when the call begins. */
static __always_inline void read_request(struct request *request)
{
	__u64 len = request->addr_len;

	barrier_var(len); /* the verifier wants the very register that is compared */
	if (len > sizeof(request->sockaddr))
		len = sizeof(request->sockaddr);
	if (!bpf_probe_read_user(request->sockaddr, len, (void *)request->user_addr))
		request->read_len = len;
}

static __always_inline __u16 get_asked_family(struct request *request)
{
	return request->read_len >= sizeof(request->family) ? request->family : AF_UNSPEC;
}

static __always_inline void fill_process(struct bind_event *event, struct task_struct *task)
{
	struct task_struct *parent = BPF_CORE_READ(task, real_parent);
	__u64 thread = bpf_get_current_pid_tgid();
	__u64 owner = bpf_get_current_uid_gid();

	event->pid = thread >> 32;
	event->tid = (__u32)thread;
	event->ppid = BPF_CORE_READ(parent, tgid);
	event->uid = (__u32)owner;
	event->gid = owner >> 32;
	event->mountnsid = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	parent = BPF_CORE_READ(parent, group_leader);
	bpf_probe_read_kernel_str(event->parent_comm, sizeof(event->parent_comm), &parent->comm);
	bpf_probe_read_kernel_str(event->exe, sizeof(event->exe),
				  BPF_CORE_READ(task, mm, exe_file, f_path.dentry, d_name.name));
	get_cgroup(event, task);
}

static __always_inline void fill_socket(struct bind_event *event, struct sock *sk, struct net *net)
{
	event->known |= KNOWN_SOCKET;
	event->family = get_family(sk);
	event->sock_type = BPF_CORE_READ(sk, sk_type);
	event->proto = BPF_CORE_READ(sk, sk_protocol);
	event->port = BPF_CORE_READ(sk, __sk_common.skc_num); /* inet_sport is set only after post_bind */
	event->opts = get_opts(sk);
	event->cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	/* The receiving address: of a multicast bind the sending one is 0. */
	if (event->family == AF_INET6) {
		event->v6only = BPF_CORE_READ_BITFIELD_PROBED(sk, __sk_common.skc_ipv6only);
		bpf_core_read(event->addr, 16, &sk->__sk_common.skc_v6_rcv_saddr);
	} else {
		bpf_core_read(event->addr, 4, &sk->__sk_common.skc_rcv_saddr);
	}
	/* Read late: bind itself may set it, from a scope id. */
	event->ifindex = BPF_CORE_READ(sk, __sk_common.skc_bound_dev_if);
	if (event->ifindex)
		get_ifname(event->ifname, net, event->ifindex);
}

static __always_inline void fill_request(struct bind_event *event, struct request *request)
{
	__u16 family = get_asked_family(request);

	if (!(event->known & KNOWN_SOCKET))
		event->family = family;
	else if (family == AF_UNSPEC) /* IPv4 sockets take it, for the wildcard */
		family = event->family;
	if (!is_inet(family) || request->read_len < 4)
		return;
	event->asked_family = family;
	event->asked_port = swap16(request->port);
	event->known |= KNOWN_ASKED_PORT;
	if (family == AF_INET && request->read_len >= 8) {
		__builtin_memcpy(event->asked_addr, request->v4, 4);
		event->known |= KNOWN_ASKED_ADDR;
	} else if (family == AF_INET6 && request->read_len >= 24) {
		__builtin_memcpy(event->asked_addr, request->v6, 16);
		event->known |= KNOWN_ASKED_ADDR;
	}
}

static __always_inline void fill_event(struct bind_event *event, struct attempt *attempt)
{
	struct task_struct *task = attempt->task;
	struct sock *sk = attempt->sk;
	struct net *net;

	/* A slot is not cleared when it is reserved. */
	__builtin_memset(event, 0, sizeof(*event));
	event->boottime_ns = bpf_ktime_get_boot_ns();
	event->hook = attempt->hook;
	event->error = attempt->error;
	fill_process(event, task);
	net = sk ? BPF_CORE_READ(sk, __sk_common.skc_net.net) : BPF_CORE_READ(task, nsproxy, net_ns);
	event->netnsid = BPF_CORE_READ(net, ns.inum);
	if (sk)
		fill_socket(event, sk, net);
	if (attempt->cookie)
		event->cookie = attempt->cookie;
	if (attempt->request)
		fill_request(event, attempt->request);
}

/* Counts one attempt and puts it into the ring. */
static __always_inline void submit(struct attempt *attempt)
{
	struct bind_counters *counts = get_counters();
	struct bind_event *event;
	__u64 waiting;

	if (!counts)
		return;
	count(&counts->attempted);
	event = bpf_ringbuf_reserve(&ring, sizeof(*event), 0);
	if (!event) {
		count(&counts->lost_ring_full);
		return;
	}
	fill_event(event, attempt);
	waiting = bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA);
	bpf_ringbuf_submit(event, waiting - knobs.wakeup_bytes < WAKEUP_WINDOW ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	count(&counts->submitted);
}

/* --- handlers: tier tracepoint ---------------------------------------------------------------------------------- */

static __always_inline void count_lost_inflight(struct request *request)
{
	struct sock *sk = get_sock((void *)bpf_get_current_task(), request->fd);
	struct bind_counters *counts = get_counters();

	if (!counts || !is_inet(sk ? get_family(sk) : get_asked_family(request)))
		return;
	count(&counts->attempted);
	count(&counts->lost_inflight_full);
}

SEC("tracepoint/syscalls/sys_enter_bind")
int tracepoint_enter(struct syscall_enter *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct request request = {
		.user_addr = ctx->args[1],
		.fd = ctx->args[0],
		.addr_len = ctx->args[2],
	};
	__u8 yes = 1;

	read_request(&request);
	if (bpf_map_update_elem(&inflight, &thread, &request, BPF_ANY)) {
		count_lost_inflight(&request);
		bpf_map_update_elem(&overflow, &thread, &yes, BPF_ANY);
	}
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_bind")
int tracepoint_exit(struct syscall_exit *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct request *request = bpf_map_lookup_elem(&inflight, &thread);
	struct attempt attempt = {
		.task = (void *)bpf_get_current_task(),
		.request = request,
		.error = -ctx->ret,
		.hook = HOOK_TRACEPOINT,
	};

	if (!request) {
		bpf_map_delete_elem(&overflow, &thread);
		return 0;
	}
	if (attempt.error != EBADF && attempt.error != ENOTSOCK)
		attempt.sk = get_sock(attempt.task, request->fd);
	/* The page of the request was not in memory when the call began; the kernel itself has fetched it since. */
	if (!request->read_len && request->addr_len && attempt.error != EFAULT)
		read_request(request);

	if (!is_inet(attempt.sk ? get_family(attempt.sk) : get_asked_family(request))) {
		/* not ours */
	} else if (attempt.error == EFAULT) {
		struct bind_counters *counts = get_counters();

		if (counts) {
			count(&counts->attempted);
			count(&counts->faulted);
		}
	} else {
		submit(&attempt);
	}
	bpf_map_delete_elem(&inflight, &thread);
	return 0;
}

/* The context of these is the kernel's own socket. They decide about the bind: 1 lets it happen, on every path. */
static __always_inline int post_bind(struct bpf_sock *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 thread = bpf_get_current_pid_tgid();
	struct attempt attempt = {
		.task = task,
		.sk = (void *)ctx,
		.cookie = bpf_get_socket_cookie(ctx), /* gives the socket one, which tracepoint_exit reads too */
		.hook = HOOK_POST_BIND,
	};

	/* tracepoint_exit reports this one, with its request. */
	if (bpf_map_lookup_elem(&inflight, &thread) || bpf_map_lookup_elem(&overflow, &thread))
		return 1;
	submit(&attempt);
	return 1;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return post_bind(ctx);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	return post_bind(ctx);
}
