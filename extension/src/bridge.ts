// The way to one kernel: snapshots in, verbs out. What they mean is the kernel's business
// (`djinn_nb/comm_bridge.py`); what is shown of them is the views'.
import type { Kernel, KernelMessage } from '@jupyterlab/services';
import type { IDisposable } from '@lumino/disposable';
import type { ISignal } from '@lumino/signaling';
import { Signal } from '@lumino/signaling';
import { Newest, isRunning, isSnapshot } from './model';
import type { Notice, Snapshot } from './protocol';
import type { Answer, Arguments, LinkState } from './tokens';
import { UrgentLine, evaluate } from './urgent';

const TARGET = 'djinn';
const HELLO_TARGET = 'djinn-push';
/** The kernel drops a comm that was silent for two minutes. */
const ALIVE_MS = 20_000;
/** A kernel that does not answer within this is asked on its subshell. */
const PATIENCE_MS = 1_000;

const IS_LOADED = `'${TARGET}' in __import__('comm').get_comm_manager().targets`;
const urgently = (verb: string) =>
  `__import__('djinn_nb.comm_bridge', fromlist=['urgent']).urgent('${verb}')`;

/** One kernel, as long as its notebook keeps it; a restart begins anew. */
export class Bridge implements IDisposable {
  /** insert: puts code into a new cell of the kernel's notebook. */
  constructor(
    readonly kernel: Kernel.IKernelConnection,
    private readonly _insert: (code: string) => void
  ) {
    this._urgent = new UrgentLine(kernel);
    kernel.registerCommTarget(HELLO_TARGET, this._greeted);
    kernel.statusChanged.connect(this._statusChanged, this);
    this._alive = window.setInterval(() => {
      this._send({ type: 'alive' });
    }, ALIVE_MS);
    void this._look();
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get state(): LinkState {
    return this._state;
  }

  get snapshot(): Snapshot | null {
    return this._newest.snapshot;
  }

  /** Pause and terminate reach the kernel while a cell runs. */
  get hasUrgentLine(): boolean {
    return this._urgent.isPossible;
  }

  /** An urgent control was sent that has to wait for the cell. */
  get isWaiting(): boolean {
    return this._isWaiting;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    window.clearInterval(this._alive);
    this._forget('the notebook was closed');
    if (!this.kernel.isDisposed) {
      this.kernel.removeCommTarget(HELLO_TARGET, this._greeted);
      this._urgent.dispose();
    }
    Signal.clearData(this);
  }

  /** Have the kernel carry out a verb. Never rejects: a refusal is an answer. */
  async do(verb: string, args: Arguments = {}): Promise<Answer> {
    if (isRunning(this.snapshot) && ['pause', 'terminate'].includes(verb)) {
      return this._doUrgently(verb, args);
    }
    return this._ask(verb, args);
  }

  private async _doUrgently(verb: string, args: Arguments): Promise<Answer> {
    const session = args['session'];
    if (session !== undefined && session !== this.snapshot?.session_id) {
      // not the one a cell waits for
      return this._ask(verb, args);
    }
    if (this.hasUrgentLine) {
      try {
        return read(await this._urgent.evaluate(urgently(verb)));
      } catch (error) {
        return { ok: false, error: String(error) };
      }
    }
    this._isWaiting = this.kernel.status === 'busy';
    this._changed.emit();
    try {
      if (verb === 'terminate' && this._isWaiting) {
        // the cell lets go of its session, which then ends
        await this.kernel.interrupt();
      }
      return await this._ask(verb, args);
    } finally {
      this._isWaiting = false;
      this._changed.emit();
    }
  }

  private _ask(verb: string, args: Arguments): Promise<Answer> {
    if (!this._comm) {
      return Promise.resolve({ ok: false, error: 'djinn_nb is not loaded' });
    }
    const id = this._next++;
    return new Promise(resolve => {
      this._answers.set(id, resolve);
      this._send({ type: 'do', verb, args: { ...args }, id });
    });
  }

  private _send(message: KernelMessage.ICommMsgMsg['content']['data']): void {
    if (this._comm && !this._comm.isDisposed && !this.kernel.isDisposed) {
      this._comm.send(message);
    }
  }

  // -- finding djinn_nb -------------------------------------------------------------------------

  /** Ask whether djinn_nb is loaded, and if so open the comm. */
  private async _look(): Promise<void> {
    const look = ++this._looks;
    try {
      const info = await this.kernel.info;
      if (info.language_info.name !== 'python') {
        this._be('foreign', look);
        return;
      }
      if (await this._isLoaded()) {
        await this._open(look);
      } else {
        this._be('not-loaded', look);
      }
    } catch {
      // it went away meanwhile; its status says so
      this._be(this._stateOfKernel() ?? 'not-loaded', look);
    }
  }

  private async _isLoaded(): Promise<boolean> {
    const asked = evaluate(this.kernel, IS_LOADED);
    const first = await Promise.race([
      asked,
      new Promise<null>(resolve => {
        window.setTimeout(() => resolve(null), PATIENCE_MS);
      })
    ]);
    if (first !== null) {
      return first === 'True';
    }
    // a cell runs, perhaps one that waits for a stop
    const found = this._urgent.isPossible
      ? await this._urgent.evaluate(IS_LOADED)
      : await asked;
    return found === 'True';
  }

  private async _open(look: number): Promise<void> {
    if (look !== this._looks || this._isDisposed || this._comm) {
      return;
    }
    const comm = this.kernel.createComm(TARGET);
    this._comm = comm;
    comm.onMsg = message => this._heard(comm, message);
    comm.onClose = () => {
      if (this._comm === comm) {
        this._forget('djinn_nb was unloaded');
        this._be('not-loaded', this._looks);
      }
    };
    if (this._urgent.isPossible) {
      // until then messages wait for the cell that runs
      await Promise.race([
        (comm as Kernel.IComm & { subshellStarted?: Promise<void> })
          .subshellStarted,
        new Promise(resolve => window.setTimeout(resolve, PATIENCE_MS))
      ]);
    }
    if (this._comm !== comm || this.kernel.isDisposed) {
      return;
    }
    void comm.open({}).done.catch(() => undefined);
    this._urgent.warm();
    this._be('attached', look);
  }

  /** The kernel says that djinn_nb has just been loaded. */
  private readonly _greeted = (): void => {
    this._forget('djinn_nb was loaded anew');
    void this._open(++this._looks);
  };

  private _heard(
    comm: Kernel.IComm,
    message: KernelMessage.ICommMsgMsg<'iopub' | 'shell'>
  ): void {
    if (comm !== this._comm) {
      return;
    }
    const data = message.content.data as Record<string, unknown>;
    switch (data['type']) {
      case 'snapshot':
        if (
          isSnapshot(data['snapshot']) &&
          this._newest.take(data['snapshot'])
        ) {
          this._changed.emit();
        }
        break;
      case 'answer': {
        const told = this._answers.get(data['id'] as number);
        this._answers.delete(data['id'] as number);
        const notice = data['error'] as Notice | null;
        told?.({ ok: data['ok'] === true, error: notice?.text ?? null });
        break;
      }
      case 'insert_cell':
        if (typeof data['code'] === 'string') {
          this._insert(data['code']);
        }
        break;
    }
  }

  // -- coming and going -------------------------------------------------------------------------

  private _statusChanged(): void {
    const state = this._stateOfKernel();
    const was = this._wasAway;
    this._wasAway = state !== null;
    if (state !== null) {
      this._forget('the kernel was restarted');
      this._urgent.reset();
      this._be(state, ++this._looks);
    } else if (was) {
      void this._look();
    } else {
      this._changed.emit();
    }
  }

  /** What a kernel that is away is called; null: it is there. */
  private _stateOfKernel(): LinkState | null {
    switch (this.kernel.status) {
      case 'dead':
      case 'terminating':
        return 'dead';
      case 'starting':
      case 'restarting':
      case 'autorestarting':
        return 'starting';
      default:
        return null;
    }
  }

  private _be(state: LinkState, look: number): void {
    if (look === this._looks && !this._isDisposed) {
      this._state = state;
      this._changed.emit();
    }
  }

  /** Let go of the comm and of all that was heard on it. */
  private _forget(why: string): void {
    const comm = this._comm;
    this._comm = null;
    this._newest.clear();
    this._isWaiting = false;
    for (const told of this._answers.values()) {
      told({ ok: false, error: why });
    }
    this._answers.clear();
    if (
      comm &&
      !comm.isDisposed &&
      this._isDisposed &&
      !this.kernel.isDisposed
    ) {
      comm.close();
    } else {
      comm?.dispose();
    }
  }

  private readonly _urgent: UrgentLine;
  private readonly _newest = new Newest();
  private readonly _changed = new Signal<this, void>(this);
  private readonly _answers = new Map<number, (answer: Answer) => void>();
  private readonly _alive: number;
  private _comm: Kernel.IComm | null = null;
  private _state: LinkState = 'starting';
  private _looks = 0;
  private _next = 1;
  private _wasAway = false;
  private _isWaiting = false;
  private _isDisposed = false;
}

/** The line of JSON that `comm_bridge.urgent` returned, as `repr` shows it. */
export function read(shown: string): Answer {
  try {
    // Python's quotes around JSON, which itself has no single ones unless escaped
    const text = shown.replace(/^['"]|['"]$/g, '').replace(/\\(['\\])/g, '$1');
    const said = JSON.parse(text) as { ok: boolean; notice: Notice | null };
    return { ok: said.ok, error: said.notice?.text ?? null };
  } catch {
    return { ok: false, error: shown };
  }
}
