/* The body of bindsnoop.bpf.c without any hook: BPF_PROG_TEST_RUN runs these as often as a test says. */
#include "bindsnoop.bpf.c"

/* One attempt that ends with the errno that is given. */
SEC("raw_tp")
int account_attempt(__u64 *ctx)
{
	struct attempt attempt = {
		.error = ctx[0],
		.hook = HOOK_KPROBE,
	};

	submit(&attempt);
	return 0;
}

/* Beginning and end of one inet_bind, as a kprobe sees them: its arguments, its result. */
SEC("raw_tp")
int account_begin(__u64 *ctx)
{
	struct arguments given = {ctx[0], ctx[1], ctx[2]};

	return kprobe_protocol(CALL_INET, given);
}

SEC("raw_tp")
int account_end(__u64 *ctx)
{
	return kretprobe_protocol(CALL_INET, ctx[0]);
}
