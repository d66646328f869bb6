"""A headless Chromium, where one is installed."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

T = TypeVar("T")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def opened(profile: Path, width: int, height: int, dark: bool = False) -> Iterator["Browser"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        screen = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[scheme]))
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What a visitor does and sees."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def until(self, found: Callable[[], T], seconds: float = 60) -> T:
        """What is found as soon as it is true."""
        end, what = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if what := found():
                    return what
            except WebDriverException:  # the page is drawn anew
                pass
            time.sleep(0.05)
        raise AssertionError(f"not in {seconds} s: {self.text()}")

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def _labelled(self, label: str):
        """The field under a label."""
        under = f"//label[.//span[normalize-space()='{label}']]//*[self::input or self::textarea]"
        path = f"//input[@aria-label='{label}'] | {under}"
        return self.until(lambda: self.driver.find_element(By.XPATH, path))

    def fill(self, label: str, text: str) -> None:
        field = self._labelled(label)
        field.clear()
        field.send_keys(text)

    def value(self, label: str) -> str:
        return self._labelled(label).get_property("value")

    def click(self, text: str) -> None:
        """A button, choice or heading that says so."""
        says = f"[normalize-space()='{text}' or span[normalize-space()='{text}']]"
        path = f"//*[self::button or self::label]{says}"

        def clicked():
            found = self.driver.find_elements(By.XPATH, path)
            shown = [each for each in found if each.is_displayed()]
            for each in shown[:1]:
                self.driver.execute_script("arguments[0].click()", each)
            return shown

        self.until(clicked)

    def pictures(self) -> list[tuple[int, str]]:
        """The width of each that is loaded, px in the file, and its caption."""
        return [
            tuple(pair)
            for pair in self.driver.execute_script(
                "return [...document.querySelectorAll('.pictures .thumbnail-lg')].map(item =>"
                " [item.querySelector('img').naturalWidth,"
                " item.querySelector('.caption-label').innerText])"
            )
            if pair[0]
        ]

    def strangers(self) -> list[str]:
        """What was asked of other hosts."""
        return self.driver.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
            ".filter(name => name.startsWith('http') && !name.startsWith(location.origin))"
        )
