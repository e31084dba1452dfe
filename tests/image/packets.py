"""Tell each kind of packet that containers send over a bridge, as lines of JSON: packets.py BRIDGE; in a container of the host's network."""

import json
import socket
import struct
import sys

# Of packet(7), which Python's socket does not name.
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, PACKET_OUTGOING = 263, 1, 1, 4
EVERY_TYPE = 3
IPV4, ARP = 0x0800, 0x0806

bridge = sys.argv[1]
listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_TYPE))
listener.bind((bridge, EVERY_TYPE))
# What goes from one container to another is not for this host: only a promiscuous bridge hears it.
wanted = struct.pack("iHH8s", socket.if_nametoindex(bridge), PACKET_MR_PROMISC, 0, b"")
listener.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, wanted)
print("listening", flush=True)
told = set()
while True:
    packet, (_, kind, direction, *_) = listener.recvfrom(65535)
    if direction == PACKET_OUTGOING:  # this host's own
        continue
    to, port = packet[:6].hex(":"), 0
    body = packet[14:]
    if kind == IPV4:
        ports = 4 * (body[0] & 15)
        to, port = socket.inet_ntoa(body[16:20]), int.from_bytes(body[ports + 2 : ports + 4], "big")
    elif kind == ARP:
        to = socket.inet_ntoa(body[24:28])
    if (kind, to, port) not in told:
        told.add((kind, to, port))
        print(json.dumps([kind, to, port]), flush=True)
