"""What rules.yml must find, and what it must not. Nothing here is ever run."""

import http.client
import importlib
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import tarfile
import tempfile
import urllib.request
from html import escape

import jinja2
import numpy as np
import requests
import torch
import transformers
import yaml

from backprop.edges import process
from backprop.engine import templates


def pickles(path, content):
    # ruleid: pickle-of-a-stranger
    pickle.loads(content)
    # ruleid: pickle-of-a-stranger
    torch.load(path)
    # ruleid: pickle-of-a-stranger
    torch.load(path, weights_only=False)
    # ruleid: pickle-of-a-stranger
    np.load(path, allow_pickle=True)
    # ok: pickle-of-a-stranger
    torch.load(path, map_location="cpu", weights_only=True)
    # ok: pickle-of-a-stranger
    np.load(path)


def models(path, trust):
    # ruleid: model-of-a-stranger-by-pickle
    transformers.AutoModelForCausalLM.from_pretrained(path, device_map="auto")
    # ok: model-of-a-stranger-by-pickle
    transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, device_map="auto")
    # ruleid: code-of-a-stranger
    transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    # ok: code-of-a-stranger
    transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust)


def programs(text, settings):
    # ruleid: text-that-is-run
    eval(text)
    # ruleid: text-that-is-run
    exec(text)
    # ruleid: text-that-is-run
    importlib.import_module(settings["auto_map"])
    # ok: text-that-is-run
    importlib.import_module("peft")
    # ruleid: shell
    subprocess.run(text, shell=True)
    # ruleid: shell
    os.system(text)
    # ok: shell
    subprocess.run([text], check=False)


def network(url, host):
    # ruleid: network-without-a-limit-of-time
    urllib.request.urlopen(url)
    # ruleid: network-without-a-limit-of-time
    http.client.HTTPSConnection(host)
    # ruleid: network-without-a-limit-of-time
    requests.get(url)
    # ruleid: network-without-a-limit-of-time
    requests.get(url, timeout=None)
    # ok: network-without-a-limit-of-time
    http.client.HTTPSConnection(host, timeout=5)
    # ok: network-without-a-limit-of-time
    socket.create_connection((host, 80), 5)
    # ruleid: tls-that-is-not-verified
    requests.get(url, timeout=5, verify=False)
    context = ssl.create_default_context()
    # ruleid: tls-that-is-not-verified
    context.check_hostname = False
    # ok: tls-that-is-not-verified
    http.client.HTTPSConnection(host, timeout=5, context=context)


def settings_of(text):
    # ruleid: yaml-that-makes-objects
    yaml.load(text, Loader=yaml.Loader)
    # ok: yaml-that-makes-objects
    yaml.safe_load(text)


def chat_templates(text, tokenizer, messages):
    # ruleid: template-outside-of-the-sandbox
    jinja2.Template(text)
    # ruleid: template-outside-of-the-sandbox
    jinja2.Environment().from_string(text)
    # ok: template-outside-of-the-sandbox
    jinja2.Environment().parse(text)
    # ruleid: template-without-limits
    tokenizer.apply_chat_template(messages)
    with templates.limited():
        # ok: template-without-limits
        tokenizer.apply_chat_template(messages)


def row_of(manifest):
    # ruleid: page-that-is-not-escaped
    return f"<p>{manifest['status']}</p>"


def name_of(event):
    # ruleid: page-that-is-not-escaped
    return f"<p>{event.name}</p>"


def cell_of(manifest):
    said = str(manifest.get("error"))
    # ruleid: page-that-is-not-escaped
    return f'<td class="said">{said}</td>'


def escaped(manifest):
    said = escape(str(manifest.get("error")))
    # ok: page-that-is-not-escaped
    return f'<td class="said">{said}</td>'


def no_page(manifest, rows):
    # ok: page-that-is-not-escaped
    return f"{manifest['status']} after {len(rows)} rows"


def archives(path, folder):
    with tarfile.open(path) as archive:
        # ruleid: archive-that-leaves-its-folder
        archive.extractall(folder)
        # ok: archive-that-leaves-its-folder
        archive.extractall(folder, filter="data")
    # ruleid: archive-that-leaves-its-folder
    shutil.unpack_archive(path, folder)


def files():
    # ruleid: name-that-is-guessed
    tempfile.mktemp()
    # ok: name-that-is-guessed
    tempfile.TemporaryDirectory()


def secrets(url):
    token = os.environ["HF_TOKEN"]
    # ruleid: secret-on-a-command-line
    subprocess.run(["hf", "--token", token], check=False)
    # ruleid: secret-on-a-command-line
    process.run([f"--key={os.environ.get('OLLAMA_API_KEY')}"])
    # ruleid: secret-on-a-command-line
    print(token)
    # ok: secret-on-a-command-line
    subprocess.run(["hf", "--home", os.environ["HF_HOME"]], check=False)
