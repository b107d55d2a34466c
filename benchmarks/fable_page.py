"""How quick is fable in the page? Tokens a second, and seconds to the first word, in Chromium from a local server.

    python dev.py site && python benchmarks/fable_page.py [--rounds 5]

Each round opens the page anew, without a cache; it writes a tale at strength 0 and then a card at strength 1. The
medians, with the lowest and the highest.
"""
import argparse
import functools
import http.server
import re
import statistics
import threading
import time
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "site" / "_build" / "html"
WRITTEN = "() => document.querySelector('.lora-place[data-alive] .big span[title]')"
MEASURED = "() => document.querySelector('.say').textContent.includes('measured in this page')"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def one_round(browser, address: str) -> tuple[float, float, float]:
    """Seconds to the first word; tokens a second of the tale, without the adapter; and of the card, with it."""
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_function(WRITTEN)
    first, speeds = time.perf_counter() - began, []
    for strength, button in ((0, "a tale"), (1, "a card")):
        for _ in range(10 * strength):
            page.get_by_role("slider", name="strength").press("ArrowRight")
        page.get_by_role("button", name=button).click()
        page.wait_for_timeout(500)
        page.wait_for_function(MEASURED)
        speeds.append(float(re.search(r"(\d+) tokens a second", page.locator(".say").inner_text())[1]))
    page.context.close()
    return first, *speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    if not PAGE.is_dir():
        raise SystemExit(f"{PAGE} is not there: python dev.py site")
    from playwright.sync_api import sync_playwright
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(PAGE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        found = [one_round(browser, f"http://127.0.0.1:{server.server_port}/") for _ in range(args.rounds)]
    for what, values in zip(("seconds to the first word", "tokens a second, off", "tokens a second, adapter on"),
                            zip(*found)):
        print(f"{what}: {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
