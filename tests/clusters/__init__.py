"""Tests with several hosts and with the engines of clusters: `make test-clusters`. hosts.py makes the hosts."""
