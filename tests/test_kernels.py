"""The oldest and the newest kernel of the matrix, booted once each: the short form of `make test-kernels`."""

from __future__ import annotations

import concurrent.futures

import pytest

from tests.kernel import guests, matrix

SHORT = ("5.10", "7.3")

# The first run fetches kernels and a root image, and an emulated kernel takes its time.
pytestmark = pytest.mark.timeout(2 * matrix.TIMEOUT_S)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], matrix.Report]:
    """What each tier did in each of the two kernels, side by side."""
    for series in SHORT:
        guests.prepare(series, "x86_64")
    with concurrent.futures.ThreadPoolExecutor(len(SHORT)) as pool:
        runs = {
            series: pool.submit(matrix.reports, series, "x86_64", matrix.TIERS, privileges=series == SHORT[0])
            for series in SHORT
        }
    return {(series, report.tier): report for series, run in runs.items() for report in run.result()}


@pytest.mark.parametrize("tier_there", matrix.TIERS)
@pytest.mark.parametrize("series", SHORT)
def test_every_kind_of_bind_is_seen_in_another_kernel(
    reports: dict[tuple[str, str], matrix.Report], series: str, tier_there: str
) -> None:
    """Each tier opens there, and every case that this kernel can make passes."""
    report = reports[series, tier_there]

    assert report.release.startswith(series)
    assert report.well, f"{report}\n{report.broken}"


def test_a_guest_gives_back_all_that_its_job_did() -> None:
    """What it printed, its exit code and its files come back byte by byte, from the kernel that was asked for."""
    job = "import os, pathlib; pathlib.Path('/out/a').write_bytes(bytes(range(256)) * 512); print(os.uname().release)"
    result = guests.run(["python3", "-c", f"{job}; raise SystemExit(7)"], kernel=SHORT[0])

    assert (7, f"{result.release}\n") == (result.returncode, result.stdout)
    assert {"a": bytes(range(256)) * 512} == result.files
    assert result.release.startswith(f"{SHORT[0]}.")


def test_a_guest_that_does_not_end_is_stopped() -> None:
    """After its time a guest is no more, and the error says so."""
    with pytest.raises(guests.GuestFailed, match=r"^the guest with Linux 5\.10\..* had not ended after 1 s"):
        guests.run(["sleep", "1000"], kernel="5.10", timeout_s=1)


def test_a_kernel_that_breaks_shows_its_console() -> None:
    """A panic in the guest is an error with what the job and the kernel said before."""
    with pytest.raises(
        guests.GuestFailed, match=r"(?s)ended before its job did; its job said:\nhere\n.*sysrq triggered"
    ):
        guests.run(["sh", "-c", "echo here; echo c >/proc/sysrq-trigger"], kernel="5.10")


def test_rows_of_a_partial_run_take_the_place_of_their_own() -> None:
    """Same series, architecture and tier, whatever the release is now; remarks too; everything else stays."""
    before = "\n".join(
        (
            "| kernel | architecture | tier | cases passed |",
            "| --- | --- | --- | --- |",
            "| 5.10.0-32-cloud | x86_64 | fexit | 1 of 1 |",
            "| 6.1.0-50-cloud | x86_64 | fexit | 2 of 2 |",
            "| 6.1.0-50-cloud | x86_64 | kprobe | 3 of 3 |",
            "",
            "* 5.10.0-32-cloud, x86_64: nothing (1)",
            "* 6.1.0-50-cloud, x86_64: something: with a colon (1)",
        )
    )
    found = "| 6.1.0-51-cloud | x86_64 | fexit | 4 of 4 |\n\n* 6.1.0-51-cloud, x86_64: other (2)"

    expected = before.replace("6.1.0-50-cloud | x86_64 | fexit | 2 of 2", "6.1.0-51-cloud | x86_64 | fexit | 4 of 4")
    expected = expected.replace(
        "6.1.0-50-cloud, x86_64: something: with a colon (1)", "6.1.0-51-cloud, x86_64: other (2)"
    )
    assert expected == matrix.merged(before, found)
    with pytest.raises(guests.GuestFailed, match=r"no row of 6\.1, aarch64, bcc"):
        matrix.merged(before, "| 6.1.0-51-cloud | aarch64 | bcc | 4 of 4 |")
