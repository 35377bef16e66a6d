/* Every attempt to bind an inet or inet6 socket, as one struct bind_event in the ring.
 *
 * Tiers differ in where they look; loader and reader choose programs by name, and all programs share one body,
 * submit(). Order: knobs, maps, readers, body, handlers.
 *
 *   fexit       the kernel's own functions, through BPF trampolines:
 *               inet_bind, inet6_bind, mptcp_bind: every bind that reaches a socket's protocol, whoever asked for it.
 *               security_socket_bind: what a security module denies before.
 *               __sys_bind: what fails earlier still, for there is no socket or no readable address.
 *   kprobe      the same functions, through breakpoints at their beginning and end.
 *   tracepoint  tracepoint_enter, tracepoint_exit: bind() of native processes, failed ones too, with the request.
 *               post_bind4, post_bind6: what those miss and succeeds: io_uring, 32-bit processes, the kernel itself.
 *
 * One object serves every kernel and architecture of one byte order: what differs is found out when it is loaded.
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

/* The longest request that the kernel reads: sizeof(struct sockaddr_storage). */
#define MAX_ADDR_LEN 128

/* Each hash bucket of devices holds one in practice. */
#define MAX_DEVICES_WALKED 8
#define DEVICE_BUCKETS 256

/* --- maps ------------------------------------------------------------------------------------------------------- */

/* A call under way. A thread can be in several at once, one inside the other, but in each only once. */
enum call {
	CALL_TRACEPOINT = 0, /* bind(), at its tracepoints */
	CALL_SYSCALL = 1,    /* __sys_bind */
	CALL_SECURITY = 2,   /* security_socket_bind */
	CALL_INET = 3,       /* inet_bind, inet6_bind */
	CALL_MPTCP = 4,      /* mptcp_bind */
};

/* What was asked for, from the beginning of the call to its end. */
struct request {
	__u64 number; /* tells one call from the next by the same thread */
	union {
		__u64 user_addr; /* of a system call */
		__u64 socket;	 /* of every other, a pointer */
	};
	__u32 fd; /* of a system call */
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

_Static_assert(sizeof(struct request) == 56, "request is 56 bytes, without a hole");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20); /* the loader sets it */
} ring SEC(".maps");

/* No knob, for it changes while the programs run. */
volatile struct bind_control control SEC(".data.control") = {};

/* An array that the reader maps, with a slot a CPU and one for the reader's own counts: reading a per-CPU map is a system
 * call during which the kernel skips programs on that CPU, and the counters of losses must not cause any.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* the loader sets it: the number of CPUs, and one more */
	__type(key, __u32);
	__type(value, struct bind_counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64); /* enum call << 56 | thread group << 32 | thread */
	__type(value, struct request);
} inflight SEC(".maps");

/* Calls whose request found no room in `inflight`, so that nobody else reports or counts them too. */
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

/* Reads along a chain of pointers. `direct`: the verifier knows the type of the first, and then each step is one load,
 * of zero where nothing is mapped; else each is a call of some sixty instructions.
 *
 * From Linux 6.2 until BTF was sorted, the verifier takes about a millisecond for each direct step, so only programs
 * that run for every bind read like that: those that are `fast`.
 */
#define READ(direct, from, ...) ((direct) ? ___arrow((from), __VA_ARGS__) : BPF_CORE_READ((from), __VA_ARGS__))

/* Since Linux 5.11 (3ca1032ab7ab, "bpf: Implement get_current_task_btf and RET_PTR_TO_BTF_ID"). */
static __always_inline bool has_direct_task(void)
{
	return bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf);
}

static __always_inline __u16 get_family(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_family);
}

static __always_inline struct file **get_file_slot(struct task_struct *task, bool direct, __u32 fd)
{
	struct fdtable *fdt = READ(direct, task, files, fdt);

	return fd < READ(direct, fdt, max_fds) ? READ(direct, fdt, fd) + fd : NULL;
}

/* The socket behind a descriptor of the current process, NULL when it is none. */
static __always_inline struct sock *get_sock(__u32 fd, bool fast)
{
	struct file **slot, *file = NULL;
	struct socket *socket;

	slot = fast && has_direct_task() ? get_file_slot(bpf_get_current_task_btf(), true, fd)
					 : get_file_slot((void *)bpf_get_current_task(), false, fd);
	if (!slot)
		return NULL;
	bpf_probe_read_kernel(&file, sizeof(file), slot);
	socket = BPF_CORE_READ(file, private_data);
	/* Another thread may have put another kind of file there meanwhile: only a socket points back to its file. */
	if (!socket || BPF_CORE_READ(socket, file) != file)
		return NULL;
	return BPF_CORE_READ(socket, sk);
}

/* What a socket has in common with its like, copied at once: a field is one load then, and sixteen are one call. */
struct sock_copy {
	union {
		struct sock_common common;
		__u8 bytes[192];
	};
};

static __always_inline struct sock_common *copy_sock(struct sock_copy *copy, struct sock *sk)
{
	__u64 size = bpf_core_type_size(struct sock_common);

	__builtin_memset(copy, 0, sizeof(*copy));
	bpf_probe_read_kernel(copy->bytes, size < sizeof(copy->bytes) ? size : sizeof(copy->bytes), sk);
	return &copy->common;
}

static __always_inline __u8 get_opts(struct sock *sk, struct sock_common *common)
{
	struct inet_sock *inet = (void *)sk;
	struct inet_sock___before_6_6 *old = (void *)sk;
	__u8 opts = 0;

	if (BPF_CORE_READ_BITFIELD(common, skc_reuse))
		opts |= OPT_REUSEADDR;
	if (BPF_CORE_READ_BITFIELD(common, skc_reuseport))
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

/* A subflow of a multipath socket: mptcp_bind calls inet_bind for it, before Linux 6.6. */
static __always_inline bool is_subflow(struct sock *sk, bool direct)
{
	struct tcp_sock *tcp = (void *)sk;

	if (!bpf_core_field_exists(tcp->is_mptcp) || READ(direct, sk, sk_protocol) != IPPROTO_TCP)
		return false;
	return BPF_CORE_READ_BITFIELD_PROBED(tcp, is_mptcp);
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

static __always_inline struct kernfs_node *get_parent(struct kernfs_node *node, bool direct)
{
	struct kernfs_node___before_6_15 *old = (void *)node;

	if (bpf_core_field_exists(node->__parent))
		return READ(direct, node, __parent);
	return READ(direct, old, parent);
}

/* The process's directory in the hierarchy of one controller. */
static __always_inline struct kernfs_node *get_controller_node(struct css_set *set, bool direct, __u32 controller)
{
	struct cgroup_subsys_state **slot = (void *)set + bpf_core_field_offset(struct css_set, subsys), *css = NULL;

	if (direct)
		css = slot[controller];
	else
		bpf_probe_read_kernel(&css, sizeof(css), slot + controller);
	return READ(direct, css, cgroup, kn);
}

/* A container may hold a whole tree of its own, such as systemd's: then its id is further up. The first name that is long
 * enough for one takes the place of the parent's. Lengths of texts include the NUL.
 */
static __always_inline void get_ancestor(struct bind_event *event, struct kernfs_node *parent, bool direct)
{
	struct kernfs_node *node = get_parent(parent, direct), *above;
	char *name = event->cgroup_parent;
	bool touched = false;
	int i;

#pragma unroll /* the verifier of 5.10 takes no loop that falls through to its beginning */
	for (i = 0; i < MAX_ANCESTORS; i++) {
		above = node ? get_parent(node, direct) : NULL;
		if (!above) /* the root has no name */
			break;
		touched = true;
		if (bpf_probe_read_kernel_str(name, CONTAINER_ID_LEN + 1, READ(direct, node, name)) >
		    CONTAINER_ID_LEN) {
			bpf_probe_read_kernel_str(name, sizeof(event->cgroup_parent), READ(direct, node, name));
			return;
		}
		node = above;
	}
	if (touched) {
		__builtin_memset(name, 0, CONTAINER_ID_LEN);
		bpf_probe_read_kernel_str(name, sizeof(event->cgroup_parent), READ(direct, parent, name));
	}
}

/* Id of the process's cgroup, its name and its parent's.
 *
 * The id is always of version 2. Where containers live in hierarchies of version 1, version 2 says only "root": there
 * the names are those of the memory controller's hierarchy, or of pids'.
 */
static __always_inline void get_cgroup(struct bind_event *event, struct task_struct *task, bool direct)
{
	struct css_set *set = READ(direct, task, cgroups);
	struct kernfs_node *node = READ(direct, set, dfl_cgrp, kn);
	struct kernfs_node *parent = get_parent(node, direct);
	long own, above;

	event->cgroup_id = READ(direct, node, id);
	if (!parent && bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id)) {
		node = get_controller_node(set, direct, bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id));
		parent = get_parent(node, direct);
	}
	if (!parent && bpf_core_enum_value_exists(enum cgroup_subsys_id, pids_cgrp_id)) {
		node = get_controller_node(set, direct, bpf_core_enum_value(enum cgroup_subsys_id, pids_cgrp_id));
		parent = get_parent(node, direct);
	}
	if (!parent) /* the root everywhere: no name */
		return;
	own = bpf_probe_read_kernel_str(event->cgroup, sizeof(event->cgroup), READ(direct, node, name));
	above = bpf_probe_read_kernel_str(event->cgroup_parent, sizeof(event->cgroup_parent),
					  READ(direct, parent, name));
	if (own <= CONTAINER_ID_LEN && above <= CONTAINER_ID_LEN)
		get_ancestor(event, parent, direct);
}

/* --- body: one attempt ------------------------------------------------------------------------------------------ */

/* What a handler knows of an attempt. */
struct attempt {
	struct sock *sk;         /* NULL: there is no socket */
	struct request *request; /* NULL: the hook cannot see it */
	__u64 cookie;
	__u32 error;
	__u8 hook;
	bool fast; /* the program runs for every bind: it must cost little, whatever its loading costs */
};

/* Counters of this CPU. NULL when the tracer is closed: then nothing is to be remembered, reported or counted. */
static __always_inline struct bind_counters *get_counters(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	if (control.closed_ns)
		return NULL;
	return bpf_map_lookup_elem(&counters, &cpu);
}

/* Handlers of cgroups can be preempted, so another may count on the same CPU in the middle. */
static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

static __always_inline __u64 get_readable_len(struct request *request)
{
	__u64 len = request->addr_len;

	barrier_var(len); /* the verifier wants the very register that is compared */
	return len > sizeof(request->sockaddr) ? sizeof(request->sockaddr) : len;
}

/* Reads the request from the process's memory; it may not be there yet when the call begins. */
static __always_inline void read_request(struct request *request)
{
	__u64 len = get_readable_len(request);

	if (!bpf_probe_read_user(request->sockaddr, len, (void *)request->user_addr))
		request->read_len = len;
}

/* Reads the copy that the kernel made of the request. */
static __always_inline void read_kernel_request(struct request *request, const void *sockaddr)
{
	__u64 len = get_readable_len(request);

	if (!bpf_probe_read_kernel(request->sockaddr, len, sockaddr))
		request->read_len = len;
}

static __always_inline __u16 get_asked_family(struct request *request)
{
	return request->read_len >= sizeof(request->family) ? request->family : AF_UNSPEC;
}

/* Threads of the kernel have no memory, and the verifier of some kernels wants to see that we know. */
static __always_inline void get_exe(struct bind_event *event, struct task_struct *task, bool direct)
{
	struct mm_struct *mm = READ(direct, task, mm);
	struct file *file = mm ? READ(direct, mm, exe_file) : NULL;

	if (file)
		bpf_probe_read_kernel_str(event->exe, sizeof(event->exe),
					  READ(direct, file, f_path.dentry, d_name.name));
}

static __always_inline void fill_process(struct bind_event *event, struct task_struct *task, bool direct)
{
	struct task_struct *parent = READ(direct, task, real_parent);
	struct nsproxy *nsproxy = READ(direct, task, nsproxy);
	__u64 thread = bpf_get_current_pid_tgid();
	__u64 owner = bpf_get_current_uid_gid();

	event->pid = thread >> 32;
	event->tid = (__u32)thread;
	event->ppid = READ(direct, parent, tgid);
	event->uid = (__u32)owner;
	event->gid = owner >> 32;
	event->mountnsid = READ(direct, nsproxy, mnt_ns, ns.inum);
	event->netnsid = READ(direct, nsproxy, net_ns, ns.inum); /* the socket's, where there is one */
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	parent = READ(direct, parent, group_leader);
	bpf_probe_read_kernel_str(event->parent_comm, sizeof(event->parent_comm), &parent->comm);
	get_exe(event, task, direct);
	get_cgroup(event, task, direct);
}

static __always_inline void fill_socket(struct bind_event *event, struct sock *sk, bool direct)
{
	struct sock_copy copy;
	struct sock_common *common = &sk->__sk_common;
	struct net *net;

	if (!direct)
		common = copy_sock(&copy, sk);
	net = common->skc_net.net;
	event->known |= KNOWN_SOCKET;
	event->family = common->skc_family;
	event->sock_type = READ(direct, sk, sk_type);
	event->proto = READ(direct, sk, sk_protocol);
	event->port = common->skc_num; /* inet_sport is set only after post_bind */
	event->opts = get_opts(sk, common);
	event->cookie = common->skc_cookie.counter;
	/* The receiving address: of a multicast bind the sending one is 0. */
	if (event->family == AF_INET6) {
		event->v6only = BPF_CORE_READ_BITFIELD(common, skc_ipv6only);
		__builtin_memcpy(event->addr, &common->skc_v6_rcv_saddr, 16);
	} else {
		__builtin_memcpy(event->addr, &common->skc_rcv_saddr, 4);
	}
	event->netnsid = READ(direct, net, ns.inum);
	/* Read late: bind itself may set it, from a scope id. */
	event->ifindex = common->skc_bound_dev_if;
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
	struct sock *sk = attempt->sk;

	/* A slot is not cleared when it is reserved. */
	__builtin_memset(event, 0, sizeof(*event));
	event->boottime_ns = bpf_ktime_get_boot_ns();
	event->hook = attempt->hook;
	event->error = attempt->error;
	if (attempt->fast && has_direct_task())
		fill_process(event, bpf_get_current_task_btf(), true);
	else
		fill_process(event, (void *)bpf_get_current_task(), false);
	if (sk)
		fill_socket(event, sk, attempt->fast && attempt->hook == HOOK_FEXIT);
	if (attempt->cookie)
		event->cookie = attempt->cookie;
	if (attempt->request)
		fill_request(event, attempt->request);
}

/* The loader's knobs are constants to the verifier: what nobody asked for costs nothing. */
static __always_inline bool is_wanted_process(void)
{
	__u32 pid = bpf_get_current_pid_tgid() >> 32, i;

	if (!knobs.pid_count)
		return true;
	for (i = 0; i < MAX_WANTED; i++)
		if (i < knobs.pid_count && pid == knobs.pids[i])
			return true;
	return false;
}

static __always_inline bool is_wanted(struct attempt *attempt)
{
	struct sock *sk = attempt->sk; /* or libbpf would look for our struct in the kernel */
	__u16 got = 0, asked = 0;
	bool found = false;
	__u32 i;

	if ((knobs.only_success && attempt->error) || !is_wanted_process())
		return false;
	if (knobs.port_count) {
		if (sk)
			got = BPF_CORE_READ(sk, __sk_common.skc_num);
		if (attempt->request && attempt->request->read_len >= 4)
			asked = swap16(attempt->request->port);
		for (i = 0; i < MAX_WANTED; i++)
			found |= i < knobs.port_count &&
				 ((got >= knobs.ports[i].first && got <= knobs.ports[i].last) ||
				  (asked >= knobs.ports[i].first && asked <= knobs.ports[i].last));
		return found;
	}
	return true;
}

/* Counts one attempt and puts it into the ring. */
static __always_inline void submit(struct attempt *attempt)
{
	struct bind_counters *counts = get_counters();
	struct bind_event *event;
	__u64 waiting;

	if (!counts || !is_wanted(attempt))
		return;
	count(&counts->attempted);
	event = bpf_ringbuf_reserve(&ring, sizeof(*event), 0);
	if (!event) {
		count(&counts->lost_ring_full);
		return;
	}
	fill_event(event, attempt);
	waiting = bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA);
	bpf_ringbuf_submit(event, waiting - knobs.wakeup_bytes < WAKEUP_WINDOW ? BPF_RB_FORCE_WAKEUP : 0);
	count(&counts->submitted);
}

/* Counts an attempt that ends up nowhere, under its cause. What of it is wanted cannot be told, but for its process. */
#define count_lost(cause)                                        \
	({                                                       \
		struct bind_counters *counts_ = get_counters();  \
		if (counts_ && is_wanted_process()) {            \
			count(&counts_->attempted);              \
			count(&counts_->cause);                  \
		}                                                \
	})

/* Counts what may have been an attempt and went past a hook that was not run. */
static __always_inline void count_skipped(void)
{
	struct bind_counters *counts = get_counters();

	if (counts)
		count(&counts->skipped);
}

/* --- body: calls under way -------------------------------------------------------------------------------------- */

static __always_inline __u64 get_key(enum call call)
{
	return bpf_get_current_pid_tgid() | (__u64)call << 56;
}

static __always_inline struct request *get_request(enum call call)
{
	__u64 key = get_key(call);

	return bpf_map_lookup_elem(&inflight, &key);
}

static __always_inline bool is_under_way(enum call call)
{
	__u64 key = get_key(call);

	return bpf_map_lookup_elem(&inflight, &key) || bpf_map_lookup_elem(&overflow, &key);
}

static __always_inline void forget(enum call call)
{
	__u64 key = get_key(call);

	bpf_map_delete_elem(&inflight, &key);
}

/* What is still remembered when the same thread makes the same call again is one whose end was never seen. */
static __always_inline void count_missed(enum call call, struct request *missed)
{
	if (call == CALL_INET || call == CALL_MPTCP || (call == CALL_TRACEPOINT && is_inet(get_asked_family(missed))))
		count_lost(lost_return_missed);
	else if (call != CALL_TRACEPOINT)
		count_skipped(); /* the attempt itself is reported elsewhere, unless it failed just here */
}

/* Remembers a request until its call returns; false when there is no room, and then only that is remembered. */
static __always_inline bool remember(enum call call, struct request *request)
{
	struct bind_counters *counts = get_counters();
	__u64 key = get_key(call);
	struct request *missed;
	__u8 yes = 1;
	int error; /* before Linux 6.4 only these bits of what a map returns mean anything */

	if (!counts)
		return true;
	request->number = ++counts->entered << 16 | bpf_get_smp_processor_id();
	error = bpf_map_update_elem(&inflight, &key, request, BPF_NOEXIST);
	if (error == -EEXIST) {
		missed = bpf_map_lookup_elem(&inflight, &key);
		if (missed)
			count_missed(call, missed);
		error = bpf_map_update_elem(&inflight, &key, request, BPF_ANY);
	}
	if (error)
		bpf_map_update_elem(&overflow, &key, &yes, BPF_ANY);
	return !error;
}

/* Whether there was no room for the request of the call that ends now. */
static __always_inline bool was_overflow(enum call call)
{
	__u64 key = get_key(call);

	return !bpf_map_delete_elem(&overflow, &key);
}

/* --- body: programs that the kernel may skip -------------------------------------------------------------------- */

/* Where the kernel can be preempted, a task may lose its CPU in the middle of one of our programs, and until it comes
 * back the kernel skips that program for everybody else on that CPU. So each has spares: copies that the loader attaches
 * behind it. A copy does its work only when none before it has: the request is not there yet, or still there.
 */
#define COPY(section, name, copy, body) \
	SEC(section)                    \
	int name(__u64 *ctx)            \
	{                               \
		body(ctx, copy);        \
		return 0;               \
	}

/* A program and its spares; body takes the context and the number of the copy. */
#define COPIES(section, name, body)            \
	COPY(section, name, 0, body)           \
	COPY(section, name##_spare1, 1, body)  \
	COPY(section, name##_spare2, 2, body)
#define LAST_COPY 2

/* As remember(), in any copy. */
static __always_inline bool remember_once(enum call call, struct request *request, int copy)
{
	__u64 key = get_key(call);
	struct request *before;

	if (copy) {
		before = bpf_map_lookup_elem(&inflight, &key);
		if (before && before->socket == request->socket && before->fd == request->fd)
			return true;
		if (!before && bpf_map_lookup_elem(&overflow, &key))
			return true;
	}
	return remember(call, request);
}

/* For ends that nobody remembers a beginning of, and that report little: whether no copy before has come this far. */
static __always_inline bool is_first(enum call call, int copy)
{
	__u64 key = get_key(call);
	__u8 yes = 1;

	if (!knobs.spares)
		return true;
	if (copy && bpf_map_lookup_elem(&overflow, &key)) {
		if (copy == LAST_COPY)
			bpf_map_delete_elem(&overflow, &key);
		return false;
	}
	if (copy != LAST_COPY)
		bpf_map_update_elem(&overflow, &key, &yes, BPF_ANY);
	return true;
}

/* --- handlers: tier tracepoint ---------------------------------------------------------------------------------- */

static __always_inline void count_lost_inflight(struct request *request)
{
	struct sock *sk = get_sock(request->fd, false);

	if (is_inet(sk ? get_family(sk) : get_asked_family(request)))
		count_lost(lost_inflight_full);
}

static __always_inline void enter_tracepoint(void *context, int copy)
{
	struct syscall_enter *ctx = context;
	struct request request = {
		.user_addr = ctx->args[1],
		.fd = ctx->args[0],
		.addr_len = ctx->args[2],
	};

	read_request(&request);
	if (!remember_once(CALL_TRACEPOINT, &request, copy))
		count_lost_inflight(&request);
}

static __always_inline void leave_tracepoint(void *context, int copy)
{
	struct syscall_exit *ctx = context;
	struct request *request = get_request(CALL_TRACEPOINT);
	struct attempt attempt = {
		.request = request,
		.error = -ctx->ret,
		.hook = HOOK_TRACEPOINT,
		.fast = !copy,
	};

	if (!request) {
		/* A copy before has done it, or there was no room, or it never began: seccomp refused the call. */
		was_overflow(CALL_TRACEPOINT);
		return;
	}
	if (attempt.error != EBADF && attempt.error != ENOTSOCK)
		attempt.sk = get_sock(request->fd, attempt.fast);
	/* The page of the request was not in memory when the call began; the kernel itself has fetched it since. */
	if (!request->read_len && request->addr_len && attempt.error != EFAULT)
		read_request(request);

	if (!is_inet(attempt.sk ? get_family(attempt.sk) : get_asked_family(request))) {
		/* not ours */
	} else if (attempt.error == EFAULT) {
		count_lost(faulted);
	} else {
		submit(&attempt);
	}
	forget(CALL_TRACEPOINT);
}

COPIES("tracepoint/syscalls/sys_enter_bind", tracepoint_enter, enter_tracepoint)
COPIES("tracepoint/syscalls/sys_exit_bind", tracepoint_exit, leave_tracepoint)

/* The context of these is the kernel's own socket. They decide about the bind: 1 lets it happen, on every path. */
static __always_inline int post_bind(struct bpf_sock *ctx)
{
	struct attempt attempt = {
		.sk = (void *)ctx,
		.cookie = bpf_get_socket_cookie(ctx), /* gives the socket one, which tracepoint_exit reads too */
		.hook = HOOK_POST_BIND,
	};

	/* tracepoint_exit reports this one, with its request. */
	if (!is_under_way(CALL_TRACEPOINT))
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

/* --- handlers: what the tiers fexit and kprobe share ------------------------------------------------------------ */

static __always_inline struct sock *get_sk(__u64 socket)
{
	return BPF_CORE_READ((struct socket *)socket, sk);
}

/* mptcp_bind reports this one, as what it is. */
static __always_inline bool is_within_mptcp(enum call call, struct sock *sk, bool direct)
{
	return call == CALL_INET && is_subflow(sk, direct) && is_under_way(CALL_MPTCP);
}

/* A call with the kernel's copy of the request. A cgroup program may rewrite that copy, so it is read at once. */
static __always_inline bool enter(enum call call, __u64 socket, const void *sockaddr, __u32 addr_len, int copy)
{
	struct request request = {.socket = socket, .addr_len = addr_len};

	read_kernel_request(&request, sockaddr);
	return remember_once(call, &request, copy);
}

/* The end of inet_bind, inet6_bind or mptcp_bind. */
static __always_inline void leave_protocol(enum call call, struct request *request, struct sock *sk, int ret, __u8 hook,
					   bool fast)
{
	struct attempt attempt = {
		.sk = sk,
		.request = request,
		.error = -ret,
		.hook = hook,
		.fast = fast,
	};

	if (!is_within_mptcp(call, sk, fast && hook == HOOK_FEXIT))
		submit(&attempt);
}

/* The end of security_socket_bind: a denial is the end of the attempt. */
static __always_inline void leave_security(struct request *request, int ret)
{
	struct attempt attempt = {
		.sk = get_sk(request->socket),
		.request = request,
		.error = -ret,
		.hook = HOOK_LSM,
	};

	if (ret && is_inet(get_family(attempt.sk)))
		submit(&attempt);
}

/* Whether __sys_bind may have failed before it called anybody else. */
static __always_inline bool is_early(int ret, int addr_len)
{
	return ret == -EBADF || ret == -ENOTSOCK || ret == -EFAULT ||
	       (ret == -EINVAL && (addr_len < 0 || addr_len > MAX_ADDR_LEN));
}

/* The end of __sys_bind: only what fails before all others. */
static __always_inline void leave_syscall(struct request *request, int ret, __u8 hook)
{
	struct attempt attempt = {
		.request = request,
		.error = -ret,
		.hook = hook,
	};

	if (!is_early(ret, request->addr_len))
		return;
	attempt.sk = get_sock(request->fd, false);
	if (ret == -EBADF || ret == -ENOTSOCK) {
		/* With a socket it is the word of somebody who has seen the request, and has been reported. */
		read_request(request);
		if (!attempt.sk && is_inet(get_asked_family(request)))
			submit(&attempt);
	} else if (attempt.sk && is_inet(get_family(attempt.sk))) {
		read_request(request);
		if (ret == -EINVAL)
			submit(&attempt);
		else if (request->addr_len && !request->read_len)
			count_lost(faulted);
	}
}

/* --- handlers: tier fexit --------------------------------------------------------------------------------------- */

/* Arguments are words: the type of the second changes between kernels. The last word of an end is the result. */

static __always_inline void enter_function(enum call call, __u64 *ctx, int copy)
{
	enter(call, ctx[0], (void *)ctx[1], ctx[2], copy);
}

static __always_inline void leave_function(enum call call, __u64 *ctx, int copy)
{
	struct request *request = get_request(call);
	struct request late = {.socket = ctx[0], .addr_len = ctx[2]};
	/* The verifier knows what the first word points to, but no longer after it has been in the map. */
	bool fast = call == CALL_INET && !copy;
	struct sock *sk = READ(fast, (struct socket *)ctx[0], sk);

	if (request && request->socket == ctx[0]) {
		leave_protocol(call, request, sk, ctx[3], HOOK_FEXIT, fast);
		forget(call);
	} else if (was_overflow(call) || !copy) {
		/* Nobody saw it begin, or had room for it: what is there now is the best that can be had. */
		read_kernel_request(&late, (void *)ctx[1]);
		leave_protocol(call, &late, sk, ctx[3], HOOK_FEXIT, false);
	}
}

static __always_inline void enter_inet(__u64 *ctx, int copy)
{
	enter_function(CALL_INET, ctx, copy);
}

static __always_inline void enter_mptcp(__u64 *ctx, int copy)
{
	enter_function(CALL_MPTCP, ctx, copy);
}

static __always_inline void leave_inet(__u64 *ctx, int copy)
{
	leave_function(CALL_INET, ctx, copy);
}

static __always_inline void leave_mptcp(__u64 *ctx, int copy)
{
	leave_function(CALL_MPTCP, ctx, copy);
}

static __always_inline void leave_security_function(__u64 *ctx, int copy)
{
	struct request request = {.socket = ctx[0], .addr_len = ctx[2]};
	int ret = ctx[3];

	if (!ret || !is_first(CALL_SECURITY, copy))
		return;
	read_kernel_request(&request, (void *)ctx[1]);
	leave_security(&request, ret);
}

static __always_inline void leave_syscall_function(__u64 *ctx, int copy)
{
	struct request request = {.fd = ctx[0], .user_addr = ctx[1], .addr_len = ctx[2]};
	int ret = ctx[3];

	if (is_early(ret, ctx[2]) && is_first(CALL_SYSCALL, copy))
		leave_syscall(&request, ret, HOOK_FEXIT);
}

COPIES("fentry/inet_bind", fentry_inet, enter_inet)
COPIES("fentry/inet6_bind", fentry_inet6, enter_inet)
COPIES("fentry/mptcp_bind", fentry_mptcp, enter_mptcp)
COPIES("fexit/inet_bind", fexit_inet, leave_inet)
COPIES("fexit/inet6_bind", fexit_inet6, leave_inet)
COPIES("fexit/mptcp_bind", fexit_mptcp, leave_mptcp)
COPIES("fexit/security_socket_bind", fexit_security, leave_security_function)
COPIES("fexit/__sys_bind", fexit_syscall, leave_syscall_function)

/* --- handlers: tier kprobe -------------------------------------------------------------------------------------- */

/* The first three arguments of a function. */
struct arguments {
	unsigned long first;
	unsigned long second;
	unsigned long third;
};

/* One load from the context: the verifier refuses what clang makes when it joins those of two architectures. */
#define LOAD(place)                                \
	({                                         \
		unsigned long value_ = (place);    \
		barrier_var(value_);               \
		value_;                            \
	})

static __always_inline struct arguments get_arguments(void *ctx)
{
	struct pt_regs___x86_64 *x86 = ctx;
	struct pt_regs___arm64 *arm = ctx;
	struct arguments found = {};

	if (bpf_core_field_exists(x86->di)) {
		found.first = LOAD(x86->di);
		found.second = LOAD(x86->si);
		found.third = LOAD(x86->dx);
	} else if (bpf_core_field_exists(arm->regs)) {
		found.first = LOAD(arm->regs[0]);
		found.second = LOAD(arm->regs[1]);
		found.third = LOAD(arm->regs[2]);
	}
	return found;
}

static __always_inline int get_result(void *ctx)
{
	struct pt_regs___x86_64 *x86 = ctx;
	struct pt_regs___arm64 *arm = ctx;

	if (bpf_core_field_exists(x86->ax))
		return LOAD(x86->ax);
	if (bpf_core_field_exists(arm->regs))
		return LOAD(arm->regs[0]);
	return 0;
}

static __always_inline int kprobe_protocol(enum call call, struct arguments given)
{
	if (!enter(call, given.first, (void *)given.second, given.third, 0) &&
	    !is_within_mptcp(call, get_sk(given.first), false))
		count_lost(lost_inflight_full);
	return 0;
}

static __always_inline int kretprobe_protocol(enum call call, int ret)
{
	struct request *request = get_request(call);

	if (request) {
		leave_protocol(call, request, get_sk(request->socket), ret, HOOK_KPROBE, call == CALL_INET);
		forget(call);
	} else if (!was_overflow(call)) {
		count_skipped();
	}
	return 0;
}

SEC("kprobe/inet_bind")
int kprobe_inet(void *ctx)
{
	return kprobe_protocol(CALL_INET, get_arguments(ctx));
}

SEC("kretprobe/inet_bind")
int kretprobe_inet(void *ctx)
{
	return kretprobe_protocol(CALL_INET, get_result(ctx));
}

SEC("kprobe/inet6_bind")
int kprobe_inet6(void *ctx)
{
	return kprobe_protocol(CALL_INET, get_arguments(ctx));
}

SEC("kretprobe/inet6_bind")
int kretprobe_inet6(void *ctx)
{
	return kretprobe_protocol(CALL_INET, get_result(ctx));
}

SEC("kprobe/mptcp_bind")
int kprobe_mptcp(void *ctx)
{
	return kprobe_protocol(CALL_MPTCP, get_arguments(ctx));
}

SEC("kretprobe/mptcp_bind")
int kretprobe_mptcp(void *ctx)
{
	return kretprobe_protocol(CALL_MPTCP, get_result(ctx));
}

SEC("kprobe/security_socket_bind")
int kprobe_security(void *ctx)
{
	struct arguments given = get_arguments(ctx);

	/* It has a socket and a request: the end of __sys_bind, seen or missed, has nothing to add. */
	forget(CALL_SYSCALL);
	enter(CALL_SECURITY, given.first, (void *)given.second, given.third, 0);
	return 0;
}

SEC("kretprobe/security_socket_bind")
int kretprobe_security(void *ctx)
{
	struct request *request = get_request(CALL_SECURITY);
	int ret = get_result(ctx);

	if (request) {
		leave_security(request, ret);
		forget(CALL_SECURITY);
	} else if (was_overflow(CALL_SECURITY)) {
		if (ret)
			count_lost(lost_inflight_full);
	} else if (ret) {
		count_skipped();
	}
	return 0;
}

SEC("kprobe/__sys_bind")
int kprobe_syscall(void *ctx)
{
	struct arguments given = get_arguments(ctx);
	struct request request = {.fd = given.first, .user_addr = given.second, .addr_len = given.third};

	remember(CALL_SYSCALL, &request);
	return 0;
}

SEC("kretprobe/__sys_bind")
int kretprobe_syscall(void *ctx)
{
	struct request *request = get_request(CALL_SYSCALL);
	int ret = get_result(ctx);

	if (request) {
		leave_syscall(request, ret, HOOK_KPROBE);
		forget(CALL_SYSCALL);
	} else if (was_overflow(CALL_SYSCALL) && (ret == -EBADF || ret == -ENOTSOCK)) {
		count_lost(lost_inflight_full);
	}
	return 0;
}
