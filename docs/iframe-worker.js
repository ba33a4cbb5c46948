// A browser starts no worker from files on disk. There, the script of a worker runs in a hidden
// frame instead, so the site's search needs no server.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      this.scope = this.frame.contentWindow;
      this.scope.postMessage = data => setTimeout(() => this.onmessage?.({ data }));
      const script = this.scope.document.createElement("script");
      script.src = new URL(url, document.baseURI);
      this.ready = new Promise(resolve => (script.onload = resolve));
      this.scope.document.head.append(script);
    }
    postMessage(data) {
      this.ready.then(() => this.scope.onmessage({ data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
