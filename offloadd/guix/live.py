"""A machines.scm that asks our daemon, each time that Guix reads it, which machines run.

guix-daemon has it read for each build, and waits for ever for a machine that is in the list and does not answer: so only those
that run are in it, and none when our daemon is away, silent or somebody else's.
"""

from __future__ import annotations

from pathlib import Path

from offloadd.guix.scheme import write

PATIENCE_S = 2
"""After which a silent daemon has no machines."""

_TEXT = """\
; Made by offload: a change is lost.
; The machines of offload's daemon that run now.  It is asked each time that this file is read; its answer is data,
; of which nothing is evaluated.  When it does not answer there are none: Guix would wait for a dead machine for ever.
(let ()
  (define socket-file {socket})
  (define owner {owner})
  ;; Copies of the machines' keys that whoever runs guix-daemon can read.
  (define keys {keys})
  (define patience {patience}) ;seconds
  (define end (+ (get-internal-real-time) (* patience internal-time-units-per-second)))
  (define request "GET /v1/offers/guix HTTP/1.0\\r\\nHost: offloadd\\r\\n\\r\\n")

  (define (wait-readable sock)
    (let ((rest (quotient (* 1000000 (max 0 (- end (get-internal-real-time)))) internal-time-units-per-second)))
      (when (null? (car (select (list sock) '() '() (quotient rest 1000000) (remainder rest 1000000))))
        (throw 'offloadd-is-silent))))

  (define (read-answer sock)
    (define chunk ((@ (rnrs bytevectors) make-bytevector) 65536))
    (define (text count)
      (string-tabulate (lambda (index) (integer->char ((@ (rnrs bytevectors) bytevector-u8-ref) chunk index))) count))
    (let loop ((answer ""))
      (wait-readable sock)
      (let ((count (recv! sock chunk)))
        (if (or (zero? count) (> (string-length answer) 1000000))
            answer
            (loop (string-append answer (text count)))))))

  (define (ask)
    (unless (= owner (stat:uid (stat socket-file)))
      (throw 'not-our-daemon))
    (let ((sock (socket PF_UNIX SOCK_STREAM 0)))
      (dynamic-wind
        (const #t)
        (lambda ()
          ;; Else a daemon that does not take connections would be waited for.
          (fcntl sock F_SETFL (logior O_NONBLOCK (fcntl sock F_GETFL)))
          (connect sock AF_UNIX socket-file)
          (display request sock)
          (force-output sock)
          (read-answer sock))
        (lambda () (close-port sock)))))

  (define (offers answer)
    (let ((gap (string-contains answer "\\r\\n\\r\\n")))
      (unless (and gap (string-prefix? "HTTP/1.1 200 " answer))
        (throw 'offloadd-refuses))
      (call-with-input-string (substring answer (+ gap 4)) read)))

  (define (offer->machine offer)
    (define (value field)
      (car (assq-ref offer field)))
    (define key
      (let ((copy (and keys (string-append keys "/" (value 'machine)))))
        (if (and copy (file-exists? copy)) copy (value 'private-key))))
    (build-machine
      (name (value 'name))
      (port (value 'port))
      (systems (value 'systems))
      (user (value 'user))
      (host-key (value 'host-key))
      (private-key key)
      (parallel-builds (value 'parallel-builds))
      (speed (value 'speed))
      (features (value 'features))
      (overload-threshold (value 'overload-threshold))))

  (catch #t
    (lambda () (map offer->machine (offers (ask))))
    (const '())))
"""


def render_live(socket: Path, owner: int, keys: Path | None = None) -> str:
    """The text of such a file.

    Args:
        socket: our daemon's.
        owner: the number of the user whom that socket must belong to.
        keys: a folder with copies of client keys, each under its machine's name, that are taken instead of the daemon's own.
    """
    return _TEXT.format(
        socket=write(str(socket)), owner=owner, keys=write(str(keys) if keys else False), patience=write(PATIENCE_S)
    )
