"""Pages in a real browser. All are opened in one window: a window costs ten times what a page does."""

import shutil
from contextlib import contextmanager

from playwright.sync_api import sync_playwright


class Window:
    """A window of Chromium, what its pages said on the console, and what they asked for."""

    def __init__(self, page):
        self.page, self.said, self.asked = page, [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, file, scheme="light", width=1000, wait_until="load"):
        """Show a file as if nothing had been shown before; what was shown before is gone."""
        # from one part of a page to another it would not be loaded anew
        self.page.goto("about:blank")
        self.page.emulate_media(media="screen", color_scheme=scheme)
        self.page.set_viewport_size({"width": width, "height": 800})
        self.said.clear()
        self.asked.clear()
        self.page.goto(file.as_uri(), wait_until=wait_until)
        return self.page

    def foreign(self, file):
        """Return what was asked for besides the file itself and what it holds."""
        return [url for url in self.asked if url.partition("#")[0] != file.as_uri() and not url.startswith("data:")]


@contextmanager
def chromium():
    """Fails, and does not skip, where no Chromium is installed: the pages are a promise."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "pages are tested in a real browser: install chromium (make test does so as root on Debian)"
    quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*quiet, "--no-first-run", "--disable-quic"])
        yield Window(browser.new_page())
        browser.close()
