"""`cyclealign serve`: serve an upstream model and its aligner as one model."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from .one_line_errors import one_line_errors

API_KEY_VARIABLE = "CYCLEALIGN_SERVE_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="cyclealign serve",
        usage="%(prog)s --aligner NAME (--upstream_model NAME | --upstream_model_name_or_path NAME) [options]",
        description="Serve an upstream model, with its answers corrected by an aligner, behind an OpenAI-compatible "
        f"chat endpoint. If {API_KEY_VARIABLE} is set, requests must send it as their bearer token.",
    )
    parser.add_argument(
        "--aligner", required=True, metavar="NAME", help="Aligner that corrects the answers: a folder or a Hub name."
    )
    parser.add_argument(
        "--aligner_template",
        metavar="TEMPLATE",
        help="Template of the aligner, if none is saved with it: a built-in name or a text.",
    )
    upstream = parser.add_mutually_exclusive_group(required=True)
    upstream.add_argument(
        "--upstream_model_name_or_path",
        metavar="NAME",
        help="Upstream model to run in this process: a folder or a Hub name.",
    )
    upstream.add_argument(
        "--upstream_model",
        metavar="NAME",
        help="Name of the upstream model at its endpoint. The API key is read from OPENAI_API_KEY.",
    )
    parser.add_argument(
        "--upstream_base_url", metavar="URL", help="Base URL of the endpoint. Defaults to OPENAI_BASE_URL or OpenAI's."
    )
    parser.add_argument(
        "--upstream_kwargs",
        metavar="JSON",
        help="Further arguments of EndpointUpstream, such as its limits: "
        '\'{"max_concurrency": 8, "rpm": 500, "prices": {"input": 0.25, "output": 2.0}, "max_cost": 5.0}\'.',
    )
    parser.add_argument(
        "--served_model_name", metavar="NAME", help="Name of the served model. Defaults to the last part of --aligner."
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="Port to listen on. 0 picks a free one. (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        metavar="N",
        help="Maximum number of answers to generate or correct in one batch. (default: %(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="Maximum number of tokens of an answer or a correction. Defaults to the limit of Aligner.",
    )
    parser.add_argument("--dtype", default="auto", help="Dtype of the model weights. (default: %(default)s)")
    parser.add_argument("--device", help="Device of the models. Defaults to the accelerator, if there is one.")
    parser.add_argument(
        "--max_body_size",
        type=int,
        default=2**20,
        metavar="BYTES",
        help="Maximum size of a request body, in bytes. (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Load both models and serve until a signal. Requests in flight are finished before the exit."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("upstream_base_url", "upstream_kwargs"):
        if getattr(args, name) is not None and args.upstream_model is None:
            parser.error(f"--{name} needs --upstream_model, the name of the model at an endpoint.")
    with one_line_errors(parser.prog):
        from aiohttp import web

        from ..aligner.aligner import Aligner
        from ..aligner.serving.server import AlignedServer
        from ..aligner.upstreams import AlignedUpstream, EndpointUpstream, ModelUpstream, Upstream
        from .inputs import parse_json_object

        loading_kwargs = {
            "batch_size": args.batch_size,
            "max_new_tokens": args.max_new_tokens,
            "device": args.device,
            "model_init_kwargs": {"dtype": args.dtype},
        }
        upstream: Upstream
        if args.upstream_model is not None:
            kwargs = parse_json_object("upstream_kwargs", args.upstream_kwargs)
            try:
                upstream = EndpointUpstream(args.upstream_model, args.upstream_base_url, **kwargs)
            except TypeError as error:
                raise ValueError(f"The upstream does not accept these upstream_kwargs: {error}") from error
        else:
            upstream = ModelUpstream(args.upstream_model_name_or_path, **loading_kwargs)
        aligner = Aligner.from_pretrained(args.aligner, template=args.aligner_template, **loading_kwargs)
        name = args.served_model_name or Path(args.aligner).name
        server = AlignedServer(
            AlignedUpstream(upstream, aligner),
            name,
            api_key=os.environ.get(API_KEY_VARIABLE) or None,
            max_body_size=args.max_body_size,
        )
        listening = socket.create_server((args.host, args.port), backlog=1024)
    host, port = listening.getsockname()[:2]
    print(f"Serving {name} at http://{host}:{port}/v1 (press Ctrl+C to stop).", flush=True)
    web.run_app(
        server.make_app(),
        sock=listening,
        backlog=1024,
        handler_cancellation=True,  # stops work for clients that have disconnected
        access_log=None,
        print=None,
    )
