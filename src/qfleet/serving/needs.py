"""What a policy's server needs beside qfleet itself."""

from qfleet.config import ConfigError


def check_extra() -> None:
    """Raises ConfigError if a package that a server needs isn't installed."""
    try:
        import prometheus_client
        import starlette
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"a server needs Starlette, uvicorn and prometheus-client ({error}); pip install 'qfleet[serve]'"
        ) from error
    del prometheus_client, starlette, uvicorn
