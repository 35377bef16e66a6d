/* A writer of perf buffers that needs no kprobes: each getppid() of one process writes one record of 416 bytes, which
 * begins with its time and its number. PID is defined by whoever compiles it.
 */
#include <linux/types.h>

BPF_PERF_OUTPUT(events);
/* 0: written, 1: refused */
BPF_ARRAY(counts, __u64, 2);

struct record {
	__u64 time_ns;
	__u64 number;
	__u64 rest[50];
};

int on_call(struct bpf_raw_tracepoint_args *ctx)
{
	struct record record = {};
	int refused = 0;
	__u64 *count;

	if (bpf_get_current_pid_tgid() >> 32 != PID || ctx->args[1] != GETPPID)
		return 0;
	count = counts.lookup(&refused);
	if (count)
		record.number = *count;
	record.time_ns = bpf_ktime_get_ns();
	refused = !!events.perf_submit(ctx, &record, sizeof(record));
	count = counts.lookup(&refused);
	if (count)
		*count += 1;
	return 0;
}
