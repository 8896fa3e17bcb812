"The built site on this machine alone: `python tools/docs/site_server.py _docs`"
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    "Files of the site, its own page for what is missing"
    def send_error(self, code, *args, **kwargs):
        if code != 404: return super().send_error(code, *args, **kwargs)
        body = (Path(self.directory)/'404.html').read_bytes()
        self.send_response(404); self.send_header('Content-Type', 'text/html; charset=utf-8'); self.send_header('Content-Length', str(len(body))); self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def log_message(self, *args): pass


def server(folder, port=0): return ThreadingHTTPServer(('127.0.0.1', port), partial(Handler, directory=str(folder)))


def serve(folder, port):
    try: s = server(folder, port)
    except OSError: s = server(folder)                                  # the port is taken: a free one
    with s:
        print(f'http://localhost:{s.server_port}/ (Ctrl-C ends it)', flush=True)
        try: s.serve_forever()
        except KeyboardInterrupt: print()


if __name__ == '__main__': serve(sys.argv[1] if len(sys.argv) > 1 else '_docs', int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
