"""`cyclealign serve`: an upstream and an aligner behind one OpenAI-compatible chat endpoint."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from .launch import WRONG_USE, errors_in_one_line

KEY = "CYCLEALIGN_SERVE_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="cyclealign serve",
        description="Serves an upstream whose answers an aligner corrects as one model, behind an OpenAI-compatible "
        f"chat endpoint. Where {KEY} is set, requests must carry it as their bearer key.",
    )
    parser.add_argument("--aligner", required=True, help="The aligner: a folder, or a name on the Hub.")
    parser.add_argument("--aligner_template", help="Its template, where none lies beside it: a name or a text.")
    upstream = parser.add_mutually_exclusive_group(required=True)
    upstream.add_argument("--upstream_model_name_or_path", help="The upstream, to be run here.")
    upstream.add_argument(
        "--upstream_model", help="The upstream's name at its endpoint. The key is read from OPENAI_API_KEY."
    )
    parser.add_argument("--upstream_base_url", help="The endpoint. If not set: OPENAI_BASE_URL, else OpenAI's.")
    parser.add_argument("--upstream_max_concurrency", type=int, default=32, help="Calls of the endpoint at once.")
    parser.add_argument("--served_model_name", help="What both are called. If not set: the aligner's own name.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 takes any that is free.")
    parser.add_argument("--batch_size", type=int, default=16, help="Answers written or corrected at once.")
    parser.add_argument("--max_new_tokens", type=int, help="Longest answer and correction. If not set: see Aligner.")
    parser.add_argument("--dtype", default="auto", help="What the models are loaded in.")
    parser.add_argument("--device", help="Where they run. If not set: the accelerator, else the CPU.")
    parser.add_argument("--max_body_size", type=int, default=2**20, help="Largest body of a request, in bytes.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Loads both, and serves until it is interrupted or terminated; what is in hand then is finished first."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.upstream_base_url is not None and args.upstream_model is None:
        parser.error("--upstream_base_url needs --upstream_model: its name there.")
    with errors_in_one_line(parser.prog, *WRONG_USE):
        from aiohttp import web

        from ..aligner.aligner import Aligner
        from ..aligner.serving.server import AlignedServer
        from ..aligner.upstreams import AlignedUpstream, EndpointUpstream, ModelUpstream, Upstream

        loading = {
            "batch_size": args.batch_size,
            "max_new_tokens": args.max_new_tokens,
            "device": args.device,
            "model_init_kwargs": {"dtype": args.dtype},
        }
        upstream: Upstream
        if args.upstream_model is not None:
            upstream = EndpointUpstream(
                args.upstream_model, args.upstream_base_url, max_concurrency=args.upstream_max_concurrency
            )
        else:
            upstream = ModelUpstream(args.upstream_model_name_or_path, **loading)
        aligner = Aligner.from_pretrained(args.aligner, template=args.aligner_template, **loading)
        name = args.served_model_name or Path(args.aligner).name
        server = AlignedServer(
            AlignedUpstream(upstream, aligner),
            name,
            api_key=os.environ.get(KEY) or None,
            max_body_size=args.max_body_size,
        )
        listening = socket.create_server((args.host, args.port), backlog=1024)
    host, port = listening.getsockname()[:2]
    print(f"Serving {name} at http://{host}:{port}/v1 (Ctrl+C ends it).", flush=True)
    web.run_app(
        server.make_app(),
        sock=listening,
        backlog=1024,
        handler_cancellation=True,  # nobody works for a client that has gone
        access_log=None,
        print=None,
    )
