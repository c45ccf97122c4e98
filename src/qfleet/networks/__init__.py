"""Q-networks: the built-in ones, and adapters for networks of users."""

from qfleet.networks.adapters import check_network, from_nnx, make_network
from qfleet.networks.convolution import convolve
from qfleet.networks.heads import QNetwork
from qfleet.networks.own_checks import check_own_parts

__all__ = ["QNetwork", "check_network", "check_own_parts", "convolve", "from_nnx", "make_network"]
