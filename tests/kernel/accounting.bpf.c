/* The body of bindsnoop.bpf.c without any hook: BPF_PROG_TEST_RUN runs these as often as a test says. */
#include "bindsnoop.bpf.c"

/* One attempt that ends with the errno that is given. */
SEC("raw_tp")
int account_attempt(__u64 *ctx)
{
	struct attempt attempt = {
		.task = (void *)bpf_get_current_task(),
		.error = ctx[0],
		.hook = HOOK_KPROBE,
	};

	submit(&attempt);
	return 0;
}

/* Beginning and end of one inet_bind, as a kprobe sees them. */
SEC("raw_tp")
int account_begin(__u64 *ctx)
{
	return kprobe_protocol(CALL_INET, ctx);
}

SEC("raw_tp")
int account_end(__u64 *ctx)
{
	return kretprobe_protocol(CALL_INET, ctx);
}
