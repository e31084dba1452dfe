"""Be the way out of a network, and its names: sink.py ADDRESS takes the address, answers that no name exists, and passes nothing on."""

import fcntl
import socket
import struct
import sys

SIOCSIFADDR = 0x8916
NO_SUCH_NAME = b"\x81\x83"

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
address = struct.pack("16sH2s4s8s", b"eth0:1", socket.AF_INET, b"", socket.inet_aton(sys.argv[1]), b"")
fcntl.ioctl(server, SIOCSIFADDR, address)
server.bind((sys.argv[1], 53))
print("ready", flush=True)
while True:
    question, client = server.recvfrom(4096)
    server.sendto(question[:2] + NO_SUCH_NAME + question[4:6] + bytes(6) + question[12:], client)
