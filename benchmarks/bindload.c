/* Load for the benchmarks: binds at a given rate, and tells how many attempts it made and what each cost.
 *
 *   bindload [--rate N] [--seconds S] [--count N] [--mode fail|ok] [--threads N]
 *
 * fail: the same socket, bound already, is bound again and again (EINVAL). ok: socket, bind to 127.0.0.1:0, close.
 * --rate is attempts a second of all threads together, in steps of a millisecond; 0 is as fast as it goes.
 * --count is attempts of all threads together, instead of --seconds.
 *
 * Prints one line: attempts=N failed=N seconds=S ns_per_call=N cpu_ns_per_call=N, where a call is bind(), or socket +
 * bind + close, and the waiting between steps is not counted; the second is without what others ran meanwhile.
 * Every thread has made one more attempt before, to have a bound socket (mode fail): it is in attempts, not in failed.
 */
#include <arpa/inet.h>
#include <getopt.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct worker {
	pthread_t thread;
	double rate; /* attempts a second, 0 for no limit */
	double seconds;
	long count; /* 0 for no limit */
	int fail;
	long attempts;
	long failed;
	long busy_ns;
	long cpu_ns;
};

static long read_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1000000000L + now.tv_nsec;
}

static long now_ns(void)
{
	return read_ns(CLOCK_MONOTONIC);
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int held = socket(AF_INET, SOCK_STREAM, 0);
	long start = now_ns(), end = start + worker->seconds * 1e9, made = 0;

	if (worker->fail) {
		bind(held, (struct sockaddr *)&address, sizeof(address));
		worker->attempts++;
	}
	for (long step = 0;; step++) {
		long due = worker->rate ? (long)(worker->rate * (step + 1) / 1000) : made + 1000;
		long begin = now_ns(), begin_cpu = read_ns(CLOCK_THREAD_CPUTIME_ID);

		if (worker->count ? made >= worker->count : begin >= end)
			break;
		if (worker->count && due > worker->count)
			due = worker->count;
		for (; made < due; made++) {
			int fd = worker->fail ? held : socket(AF_INET, SOCK_STREAM, 0);

			worker->failed += bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0;
			if (!worker->fail)
				close(fd);
		}
		worker->busy_ns += now_ns() - begin;
		worker->cpu_ns += read_ns(CLOCK_THREAD_CPUTIME_ID) - begin_cpu;
		if (worker->rate) {
			long next = start + (step + 1) * 1000000L;
			struct timespec until = {next / 1000000000L, next % 1000000000L};

			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		}
	}
	worker->attempts += made;
	close(held);
	return NULL;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"rate", required_argument, NULL, 'r'},	   {"seconds", required_argument, NULL, 's'},
		{"count", required_argument, NULL, 'c'},   {"mode", required_argument, NULL, 'm'},
		{"threads", required_argument, NULL, 't'}, {NULL, 0, NULL, 0},
	};
	struct worker total = {.seconds = 1, .fail = 1}, *workers;
	int option, threads = 1;
	long start;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'r')
			total.rate = atof(optarg);
		else if (option == 's')
			total.seconds = atof(optarg);
		else if (option == 'c')
			total.count = atol(optarg);
		else if (option == 't' && atoi(optarg) > 0)
			threads = atoi(optarg);
		else if (option == 'm' && (!strcmp(optarg, "fail") || !strcmp(optarg, "ok")))
			total.fail = *optarg == 'f';
		else {
			fprintf(stderr, "usage: %s [--rate N] [--seconds S] [--count N] [--mode fail|ok] [--threads N]\n", *argv);
			return 2;
		}
	}
	workers = calloc(threads, sizeof(*workers));
	start = now_ns();
	for (int i = 0; i < threads; i++) {
		workers[i] = total;
		workers[i].rate /= threads;
		workers[i].count = total.count / threads + (i < total.count % threads);
		if (total.count && !workers[i].count) /* nothing left for this one, and 0 would mean no limit */
			workers[i].count = -1;
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	}
	for (int i = 0; i < threads; i++) {
		pthread_join(workers[i].thread, NULL);
		total.attempts += workers[i].attempts;
		total.failed += workers[i].failed;
		total.busy_ns += workers[i].busy_ns;
		total.cpu_ns += workers[i].cpu_ns;
	}
	printf("attempts=%ld failed=%ld seconds=%.3f ns_per_call=%.0f cpu_ns_per_call=%.0f\n", total.attempts,
	       total.failed, (now_ns() - start) / 1e9, total.attempts ? (double)total.busy_ns / total.attempts : 0.0,
	       total.attempts ? (double)total.cpu_ns / total.attempts : 0.0);
	free(workers);
	return 0;
}
