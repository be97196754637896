// Controls that cannot wait for the cell that runs: a connection of their own, on a subshell.
//
// The id of the subshell has to be in the header of a message. `requestExecute` with it in the
// metadata, and the kernel's own connection, both wait for the main thread; a clone of the
// connection that carries the id does not.
import type { Kernel, KernelMessage } from '@jupyterlab/services';

/** Where the value of an expression is, in the reply of an execution. */
const KEY = 'djinn';

/** A line to a kernel that answers while a cell runs; opened on first use, or by `warm`. */
export class UrgentLine {
  constructor(private readonly _kernel: Kernel.IKernelConnection) {}

  get isPossible(): boolean {
    return this._kernel.supportsSubshells === true;
  }

  /** Open it now, so that the first click does not wait for that. */
  warm(): void {
    if (this.isPossible) {
      // whoever needs it is told then
      this._line().catch(() => undefined);
    }
  }

  /** What a Python expression is there, as `repr` shows it. Rejects with what Python raised. */
  async evaluate(expression: string): Promise<string> {
    return evaluate(await this._line(), expression);
  }

  /** The kernel was restarted: its subshells are gone. */
  reset(): void {
    const line = this._opened;
    this._opened = null;
    line
      ?.then(connection => {
        connection.subshellId = null;
        connection.dispose();
      })
      .catch(() => undefined);
  }

  dispose(): void {
    const line = this._opened;
    this._opened = null;
    // a connection with a subshell deletes it
    line?.then(connection => connection.dispose()).catch(() => undefined);
  }

  private _line(): Promise<Kernel.IKernelConnection> {
    if (!this._opened) {
      this._opened = this._open();
      this._opened.catch(() => {
        this._opened = null;
      });
    }
    return this._opened;
  }

  private async _open(): Promise<Kernel.IKernelConnection> {
    const made = await this._kernel.requestCreateSubshell({}).done;
    const id = made.content.subshell_id;
    if (!id) {
      throw new Error('the kernel gives no subshell');
    }
    const line = this._kernel.clone({ handleComms: false });
    line.subshellId = id;
    return line;
  }

  private _opened: Promise<Kernel.IKernelConnection> | null = null;
}

/**
 * What a Python expression is in a kernel, as `repr` shows it, or, if it is None, what it printed.
 * Leaves no trace in the kernel's history.
 */
export async function evaluate(
  kernel: Kernel.IKernelConnection,
  expression: string
): Promise<string> {
  const future = kernel.requestExecute({
    code: '',
    silent: true,
    store_history: false,
    allow_stdin: false,
    stop_on_error: false,
    user_expressions: { [KEY]: expression }
  });
  let printed = '';
  future.onIOPub = message => {
    if (message.header.msg_type === 'stream') {
      printed += (message as KernelMessage.IStreamMsg).content.text;
    }
  };
  const reply = await future.done;
  if (reply.content.status !== 'ok') {
    throw new Error(`the kernel answered ${reply.content.status}`);
  }
  const found = (
    reply.content as KernelMessage.IReplyOkContent & {
      user_expressions: Record<string, unknown>;
    }
  ).user_expressions[KEY] as
    | { status: 'ok'; data: Record<string, string> }
    | { status: 'error'; evalue: string };
  if (found.status !== 'ok') {
    throw new Error(found.evalue);
  }
  const shown = found.data['text/plain'];
  return shown === 'None' ? printed.trim() : shown;
}
