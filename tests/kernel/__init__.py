"""Parts of tests that run in, or next to, the kernel."""
