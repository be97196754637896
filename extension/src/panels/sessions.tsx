// The sessions of the server: where each stands, which is current, and a prompt for another.
import * as React from 'react';
import { CONTROLS } from '../commands';
import { bytesText, where } from '../model';
import type { SessionBrief } from '../protocol';
import type { PartProps } from './parts';
import { CommandButton, can } from './parts';

/** One stop of the tab key; arrows go from button to button, as in every toolbar. */
export function Controls(props: PartProps): React.ReactElement {
  const [at, setAt] = React.useState(0);
  const bar = React.useRef<HTMLDivElement>(null);
  const count = CONTROLS.length;
  const move = (event: React.KeyboardEvent) => {
    const next: Record<string, number> = {
      ArrowRight: (at + 1) % count,
      ArrowLeft: (at + count - 1) % count,
      Home: 0,
      End: count - 1
    };
    const to = next[event.key];
    if (to !== undefined) {
      event.preventDefault();
      event.stopPropagation();
      (bar.current?.children[to] as HTMLElement | undefined)?.focus();
    }
  };
  return (
    <div
      ref={bar}
      className="jp-Djinn-controls"
      role="toolbar"
      aria-label={props.trans.__('run controls')}
      onKeyDown={move}
      onFocus={event =>
        setAt(Array.from(event.currentTarget.children).indexOf(event.target))
      }
    >
      {CONTROLS.map((id, number) => (
        <CommandButton
          key={id}
          id={id}
          commands={props.commands}
          tabIndex={number === at ? 0 : -1}
        />
      ))}
    </div>
  );
}

export function Sessions(
  props: PartProps & { readonly launching: boolean }
): React.ReactElement {
  const { trans, view } = props;
  const sessions = view.snapshot?.sessions ?? [];
  return (
    <>
      {sessions.length === 0 ? (
        <p className="jp-Djinn-empty">
          {view.snapshot?.model
            ? trans.__('No sessions. Run a prompt to launch one.')
            : trans.__('Sessions are listed here once a server is connected.')}
        </p>
      ) : (
        <ul className="jp-Djinn-list">
          {sessions.map(session => (
            <li key={session.id}>
              <Session {...props} session={session} />
            </li>
          ))}
        </ul>
      )}
      {can(view, 'launch') && <Launch {...props} />}
    </>
  );
}

function Session(
  props: PartProps & { readonly session: SessionBrief }
): React.ReactElement {
  const { trans, view, session, perform } = props;
  const current = session.id === view.snapshot?.session_id;
  const parts = [
    trans._n('%1 token', '%1 tokens', session.num_tokens),
    `KV ${bytesText(session.kv_bytes)}`,
    ...(session.tier === 'none' ? [] : [session.tier]),
    ...(session.pinned ? [trans.__('pinned')] : []),
    ...(session.parent ? [trans.__('fork of %1', session.parent)] : []),
    ...(session.taken_over ? [trans.__('moved by another client')] : [])
  ];
  return (
    <button
      type="button"
      className={`jp-Djinn-session ${current ? 'jp-mod-current' : ''}`}
      aria-current={current ? 'true' : undefined}
      disabled={!can(view, 'attach')}
      title={trans.__('Make %1 the current session', session.id)}
      onClick={() => {
        if (!current) {
          void perform('attach', { session: session.id });
        }
      }}
    >
      <span className="jp-Djinn-row">
        <span
          className={`jp-Djinn-status jp-mod-${session.status}`}
          aria-hidden="true"
        />
        <span className="jp-Djinn-grow">
          {session.id}
          {session.name && session.name !== session.id
            ? ` · ${session.name}`
            : ''}
        </span>
        {current && (
          <span className="jp-Djinn-note">{trans.__('current')}</span>
        )}
      </span>
      <span className="jp-Djinn-line">{where(session, trans)}</span>
      <span className="jp-Djinn-line jp-Djinn-note">{parts.join(' · ')}</span>
    </button>
  );
}

function Launch(
  props: PartProps & { readonly launching: boolean }
): React.ReactElement {
  const { trans, perform } = props;
  const [prompt, setPrompt] = React.useState('');
  const [count, setCount] = React.useState(24);
  const field = React.useRef<HTMLTextAreaElement>(null);
  React.useEffect(() => {
    if (props.launching) {
      field.current?.focus();
    }
  }, [props.launching]);
  return (
    <form
      className="jp-Djinn-form"
      aria-label={trans.__('launch a session')}
      onSubmit={event => {
        event.preventDefault();
        void perform('launch', { prompt, max_new_tokens: count });
      }}
    >
      <label>
        {trans.__('Prompt')}
        <textarea
          ref={field}
          rows={2}
          value={prompt}
          onChange={event => setPrompt(event.target.value)}
        />
      </label>
      <div className="jp-Djinn-row">
        <label className="jp-Djinn-grow">
          {trans.__('New tokens')}{' '}
          <input
            type="number"
            min={1}
            max={100000}
            value={count}
            onChange={event => setCount(event.target.valueAsNumber)}
          />
        </label>
        <button
          type="submit"
          className="jp-Djinn-button"
          disabled={prompt === '' || !(count >= 1)}
        >
          {trans.__('Run')}
        </button>
      </div>
    </form>
  );
}
