"""A page in the browser for one checkpoint: prompt, reference and options in, a video out.

pip install -e ".[app]"
python scripts/diffusion/app.py configs/diffusion/inference/256px.py --ckpt-path outputs/EXP
"""

import socket
import sys
from contextlib import closing
from dataclasses import dataclass

from opensora.common import one_line_errors
from opensora.config import load_config
from opensora.inference.settings import InferenceSettings, check_paths, require_available, validate
from opensora.schema import setting


@dataclass(kw_only=True)
class AppSettings(InferenceSettings):
    """Those of sampling, and where the page is."""

    host: str = setting("127.0.0.1", "address that the page is served on; 0.0.0.0 for all that can reach this machine")
    port: int = setting(7860, "its port")


def main(argv: list[str]) -> None:
    cfg = load_config(argv, AppSettings)
    cfg.prompt, cfg.cond_type, cfg.ref = cfg.prompt or "a prompt", "t2v", None  # asked for on the page
    validate(cfg, world_size=1)
    if cfg.use_t2i2v or cfg.refine_prompt:
        raise ValueError("the page draws with one model: set --use-t2i2v False and --refine-prompt False")
    require_available(cfg)
    check_paths(cfg)

    from opensora.inference.studio import Studio
    from opensora.inference.studio_page import build_page, import_gradio
    from opensora.parallel.context import ParallelContext

    import_gradio()  # this and the address before the models are loaded
    check_address(cfg.host, cfg.port)
    context = ParallelContext.create(cfg.dist_timeout)
    try:
        page = build_page(Studio(cfg, context.device), cfg)
        page.queue(default_concurrency_limit=1)
        page.launch(server_name=cfg.host, server_port=cfg.port, allowed_paths=[cfg.save_dir], share=False)
    finally:
        context.close()


def check_address(host: str, port: int) -> None:
    """ValueError if nothing can be served there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, not to wait for old connections
        try:
            server.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"host={host}, port={port}: no page can be served there ({error}): give another --port, or --host"
            ) from None


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
