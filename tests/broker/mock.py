"""A broker that lives in this process: librdkafka's own mock, through its C interface."""

from __future__ import annotations

import ctypes
from pathlib import Path


class Mock:
    """librdkafka's own mock broker, for the error codes that a real one gives only in rare trouble."""

    def __init__(self) -> None:
        import confluent_kafka

        (path,) = (Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka*.so*")
        self._lib = lib = ctypes.CDLL(str(path))
        for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
            getattr(lib, name).restype = ctypes.c_void_p
        lib.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        error = ctypes.create_string_buffer(512)
        conf = ctypes.c_void_p(lib.rd_kafka_conf_new())
        lib.rd_kafka_conf_set(conf, b"log_level", b"0", error, ctypes.c_size_t(512))
        self._handle = ctypes.c_void_p(lib.rd_kafka_new(0, conf, error, ctypes.c_size_t(512)))
        assert self._handle.value, error.value
        self._cluster = ctypes.c_void_p(lib.rd_kafka_mock_cluster_new(self._handle, 1))
        self.bootstrap = lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create(self, name: str) -> None:
        """Make a topic of one partition."""
        assert self._lib.rd_kafka_mock_topic_create(self._cluster, name.encode(), 1, 1) == 0

    def answer_produce(self, *codes: int) -> None:
        """Answer the next Produce requests with these codes."""
        array = (ctypes.c_int * len(codes))(*codes)
        self._lib.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(0), ctypes.c_size_t(len(codes)), array
        )

    def answer_slowly(self, milliseconds: int) -> None:
        """Hold every answer back for so long; 0 is at once."""
        assert self._lib.rd_kafka_mock_broker_set_rtt(self._cluster, ctypes.c_int32(1), ctypes.c_int(milliseconds)) == 0

    def close(self) -> None:
        """Stop it."""
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._handle)
