/* The few kernel types that bindsnoop.bpf.c touches, each with the fields it reads and no others.
 *
 * libbpf moves every access to where the running kernel keeps the field (CO-RE), so order and offsets here mean
 * nothing. `name___suffix` is another shape of the kernel's `name`, from before or after a change.
 */
#ifndef BINDSNOOP_KERNEL_TYPES_H
#define BINDSNOOP_KERNEL_TYPES_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

/* include/uapi/linux/bpf.h */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_F_MMAPABLE = 1 << 10,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_RB_NO_WAKEUP = 1 << 0,
	BPF_RB_FORCE_WAKEUP = 1 << 1,
	BPF_RB_AVAIL_DATA = 0,
};

enum bpf_func_id {
	BPF_FUNC_get_current_task_btf = 158,
};

/* include/linux/socket.h, include/uapi/linux/in.h, include/uapi/asm-generic/errno.h */
enum {
	AF_UNSPEC = 0,
	AF_INET = 2,
	AF_INET6 = 10,
	IPPROTO_TCP = 6,
	EBADF = 9,
	EFAULT = 14,
	EEXIST = 17,
	EINVAL = 22,
	ENOTSOCK = 88,
};

/* include/net/inet_sock.h: bits of inet_sock.inet_flags since Linux 6.6 */
enum {
	INET_FLAGS_FREEBIND = 11,
	INET_FLAGS_TRANSPARENT = 15,
	INET_FLAGS_BIND_ADDRESS_NO_PORT = 18,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* --- sockets --- */

struct ns_common {
	unsigned int inum;
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct net_device {
	char name[16];
	struct hlist_node index_hlist;
	int ifindex;
};

struct net {
	struct ns_common ns;
	struct hlist_head *dev_index_head;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

typedef struct {
	__s64 counter;
} atomic64_t;

struct sock_common {
	__be32 skc_rcv_saddr;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned char skc_reuse : 4;
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_type;
	__u16 sk_protocol;
};

struct inet_sock {
	struct sock sk;
	unsigned long inet_flags;
};

/* Before Linux 6.6 (c274af224269, "inet: introduce inet->inet_flags", and the commits after it). */
struct inet_sock___before_6_6 {
	__u8 freebind : 1;
	__u8 transparent : 1;
	__u8 bind_address_no_port : 1;
};

struct tcp_sock {
	__u8 is_mptcp : 1; /* a subflow */
};

struct socket {
	struct file *file;
	struct sock *sk;
};

/* --- processes --- */

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct file {
	void *private_data;
	struct path f_path;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct mm_struct {
	struct file *exe_file;
};

struct mnt_namespace {
	struct ns_common ns;
};

struct nsproxy {
	struct mnt_namespace *mnt_ns;
	struct net *net_ns;
};

struct kernfs_node {
	struct kernfs_node *__parent;
	const char *name;
	__u64 id;
};

/* Before Linux 6.15 (633488947ef6, "kernfs: Use RCU to access kernfs_node::parent."). */
struct kernfs_node___before_6_15 {
	struct kernfs_node *parent;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
};

struct css_set {
	struct cgroup_subsys_state *subsys[16];
	struct cgroup *dfl_cgrp;
};

/* The values depend on the kernel's configuration: only the names count. */
enum cgroup_subsys_id {
	memory_cgrp_id = 101,
	pids_cgrp_id = 102,
};

struct task_struct {
	struct mm_struct *mm;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	char comm[16];
	struct files_struct *files;
	struct nsproxy *nsproxy;
	struct css_set *cgroups;
};

/* --- registers at a kprobe: one flavour an architecture, so that one object serves them all --- */

struct pt_regs___x86_64 {
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long ax;
};

struct pt_regs___arm64 {
	__u64 regs[31];
};

#pragma clang attribute pop

/* --- contexts of programs: interfaces, not CO-RE --- */

/* Tracepoints of system calls: the trace entry is 8 bytes, 12 with PREEMPT_RT, the call's number an int behind it, and
 * the arguments start at 16 in both (kernel/trace/trace_syscalls.c, struct syscall_tp_t).
 */
struct syscall_enter {
	__u64 entry[2];
	__u64 args[6];
};

struct syscall_exit {
	__u64 entry[2];
	__s64 ret;
};

/* include/uapi/linux/bpf.h; the context of cgroup/post_bind4 and post_bind6. */
struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
};

#endif
