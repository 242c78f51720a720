"""Connections that a wait for a lost rank may hang on, and those that are not its own."""

from __future__ import annotations

import socket

from fms_parallel.dynamic.connections import Connections


def over_tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        one = socket.create_connection(door.getsockname())
        other, _ = door.accept()
    return one, other


def alive(pair: tuple[socket.socket, socket.socket]) -> bool:
    try:
        pair[0].sendall(b"x")
        return pair[1].recv(1) == b"x"
    except OSError:
        return False


def test_while_they_are_made_those_of_this_host_are_cut_and_afterwards_all_that_were_noted() -> None:
    connections, before = Connections(), (socket.socketpair(), over_tcp())
    with connections.noting():
        here, tcp = socket.socketpair(), over_tcp()
        assert connections.cut() == 2
        assert not alive(here) and alive(tcp)
    assert all(map(alive, before))
    assert connections.cut() == 4  # those of this host once more
    assert not alive(tcp) and all(map(alive, before))
    connections.forget()
    later = socket.socketpair()
    assert connections.cut() == 0 and alive(later)
    for one in (*here, *tcp, *later, *before[0], *before[1]):
        one.close()
