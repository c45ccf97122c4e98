"""Q-networks: the built-in ones, and adapters for networks of users."""

from qfleet.networks.adapters import check_network, from_nnx, make_network
from qfleet.networks.convolution import convolve
from qfleet.networks.heads import QNetwork

__all__ = ["QNetwork", "check_network", "convolve", "from_nnx", "make_network"]
