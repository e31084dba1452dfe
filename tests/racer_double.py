"""A program that answers as an engine does that is tried: by what ANSWERS says of it, in JSON."""

import json
import os
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from backprop.core.engines import Raced
from backprop.engine.race import Answer, Job
from backprop.engine.ranks import hear, tell
from backprop.errors import HardwareError
from backprop.events import Phase

connection = Connection(int(sys.argv[1]))
job: Job = hear(connection)
engine = job.plan.engine.value
with open(os.environ["TRIED"], "a", encoding="utf-8") as file:
    file.write(f"{engine} {[len(one.ids) for one in job.examples]}\n")
said = json.loads(os.environ["ANSWERS"]).get(engine, {})
tell(connection, Phase(name=f"{engine}: a word"))
match said.pop("ends", ""):
    case "badly":
        sys.exit("it fell over")
    case "in silence":
        sys.exit(0)
    case "never":
        with open(f"{os.environ['TRIED']}.pid", "w", encoding="utf-8") as file:
            file.write(str(os.getpid()))
        tell(connection, Phase(name=f"{engine}: hangs"))
        time.sleep(600)
    case "refused":
        tell(connection, HardwareError("the memory is full"))
gradient = {"a": torch.tensor([3.0, 4.0]) * said.pop("scale", 1.0), "b": torch.ones(2)}
raced = Raced(tokens_per_second=100.0, loss=2.0, proved=True)
tell(connection, Answer(raced=replace(raced, **said), gradient=gradient))
