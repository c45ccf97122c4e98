"""What a policy's server counts, for Prometheus."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_PATHS = ("/act", "/policy", "/healthz", "/metrics", "/sessions")


class Measures:
    """Counts requests, observations, batches and reloads since the server's start."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        self._registry = registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "qfleet_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "qfleet_act_seconds", "Time that a request for actions took.", registry=registry, buckets=_SECONDS
        )
        self._observations = prometheus.Counter(
            "qfleet_observations", "Observations that were answered.", registry=registry
        )
        self._batches = prometheus.Histogram(
            "qfleet_batch_size", "Observations in a batch.", registry=registry, buckets=[2**i for i in range(13)]
        )
        self._batch_seconds = prometheus.Counter(
            "qfleet_batch_seconds", "Time that the policy took for batches.", registry=registry
        )
        self._reloads = prometheus.Counter(
            "qfleet_reloads", "Times that the policy was loaded anew.", ["result"], registry=registry
        )
        self._waiting = prometheus.Gauge("qfleet_waiting_observations", "Observations that wait.", registry=registry)
        self._sessions = prometheus.Gauge("qfleet_sessions", "Sessions that are remembered.", registry=registry)

    def note_request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        known = next((known for known in _PATHS if path == known or path.startswith(f"{known}/")), "other")
        self._requests.labels(known, str(status)).inc()
        if known == "/act":
            self._seconds.observe(seconds)

    def note_batch(self, num_observations: int, seconds: float) -> None:
        """Counts a batch."""
        self._observations.inc(num_observations)
        self._batches.observe(num_observations)
        self._batch_seconds.inc(seconds)

    def note_reload(self, *, is_done: bool) -> None:
        """Counts a reload that was done or has failed."""
        self._reloads.labels("done" if is_done else "failed").inc()

    def text(self, num_waiting: int, num_sessions: int) -> tuple[bytes, str]:
        """Returns all counts in Prometheus's text format, and its content type."""
        import prometheus_client as prometheus

        self._waiting.set(num_waiting)
        self._sessions.set(num_sessions)
        return prometheus.generate_latest(self._registry), prometheus.CONTENT_TYPE_LATEST
