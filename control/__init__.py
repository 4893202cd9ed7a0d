"""The cluster: documents, placement, attachments, supervision, REST."""


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, rarely needed

    try:
        return version("dolmen-storage")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"
