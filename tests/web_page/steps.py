"""What the tests of the page have in common: what they look at and what they do."""

import functools
import json


def in_loop(test):
    """Run an async test in the loop of its fixture."""

    @functools.wraps(test)
    def run(**fixtures):
        fixtures["loop"].run(test(**fixtures))

    return run


def text(selector):
    """What an element says, as an expression for `Page.js`."""
    return f"document.querySelector({json.dumps(selector)}).textContent"


def shown(selector):
    """Whether an element is to be seen, as an expression for `Page.js`."""
    return f"document.querySelector({json.dumps(selector)}).checkVisibility()"


TALKS = f"{text('#status')} == 'Moshi is listening. Speak.'"
KNOWS_THE_MODEL = f"{text('#model')} == 'a small one'"
FOCUSED = "document.activeElement.id"


async def talk_begins(page):
    """Start a talk."""
    await page.click("#toggle")
    await page.until(TALKS)


async def name_given(page, name):
    """Give a name instead of the one that is there."""
    await page.js("document.querySelector('#name').select()")
    await page.type(name)
