"""The one error that users see: a sentence that says what is wrong, where, and what to do."""


class SpringtideError(Exception):
    """A fault in the user's input, settings or environment, told in one sentence.

    Jobs print the sentence and exit with status 1; HTTP answers it as a 4xx error body.
    """
